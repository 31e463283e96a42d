// The kernels, once for every instruction set: each isa_*.cc includes this file inside a namespace of its own, with FR_ISA set. The order
// matters; none of these files is included anywhere else.
#include "simd.h"
#include "tile.h"
#include "rows.h"
#include "linear.h"
#include "attention.h"
#include "laws.h"

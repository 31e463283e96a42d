// The kernels in plain C++, for every processor.
#include <utility>

#include "work.h"
#define FR_ISA 0
namespace portable {
#include "body.h"
}
const Kernels portable_kernels = {portable::read_row, portable::write_row, portable::linear, portable::products,
                        portable::norm, portable::emit, portable::attention, portable::append_all, portable::silu_gate, portable::top,
                        portable::temper, portable::peaks, portable::at_least, portable::weigh, portable::scale, portable::excess};

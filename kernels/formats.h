// Number formats of memory outside the kernels, the layout of packed weights, and the inputs of products.
#pragma once
#include "work.h"

int64_t size_of(int32_t format);
// Rows of bf16 or fp32 to and from fp32.
void read_row(const uint8_t* from, int32_t format, int64_t count, float* to);
void write_row(uint8_t* to, int32_t format, int64_t count, const float* from);

// Where an output of a packed matrix lives (`part`: 0 the gates, 1 the values of a gated one).
struct Lane {
    int64_t panel, lane;
};
Lane lane_of(const fr_matrix& matrix, int64_t output, int32_t part);
void pack_row(const fr_matrix& matrix, const uint8_t* source, int32_t source_format, Lane place);
float unpacked(const fr_matrix& matrix, Lane place, int64_t k);

// Room for `tokens` inputs of `matrix`. Rows are a cache line longer than needed, or equal columns would share cache sets.
Inputs inputs_for(const fr_matrix& matrix, int64_t tokens, InputRoom& room);
// Zeros between the end of what will be written and the end of what is read.
void clear_padding(const Inputs& x, int64_t tokens, int64_t written, int64_t read);

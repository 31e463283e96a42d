#include "formats.h"

#include <cmath>
#include <cstring>

namespace {

float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

int64_t padded(int32_t format, int64_t in) { return round_up(in, format == FR_INT8 ? int64_t(GROUP) : int64_t(PANEL)); }

const int64_t GROUP_BYTES = 256 + GROUP * PANEL;

void pack_floats(const fr_matrix& matrix, const uint8_t* source, int32_t source_format, Lane place) {
    uint8_t* at = matrix.data + place.panel * matrix.padded_in * PANEL * size_of(matrix.format) + place.lane * 4;
    if (matrix.format == FR_BF16 && source_format == FR_BF16) {
        const int64_t pairs = matrix.in / 2;
        for (int64_t k = 0; k < pairs; ++k) std::memcpy(at + k * 128, source + k * 4, 4);
        if (matrix.in % 2) std::memcpy(at + pairs * 128, source + pairs * 4, 2);
        return;
    }
    for (int64_t k = 0; k < matrix.in; ++k) {
        float value;
        read_row(source + k * size_of(source_format), source_format, 1, &value);
        if (matrix.format == FR_F32) {
            std::memcpy(at + k * 128, &value, 4);
        } else {
            const uint16_t half = to_bf16(value);
            std::memcpy(at + (k / 2) * 128 + (k % 2) * 2, &half, 2);
        }
    }
}

// Per group of 128 inputs: symmetric, the largest magnitude becomes 127.
void pack_int8(const fr_matrix& matrix, const uint8_t* source, int32_t source_format, Lane place) {
    float row[GROUP];
    for (int64_t g = 0; g * GROUP < matrix.padded_in; ++g) {
        const int64_t rest = matrix.in - g * GROUP, count = rest < 0 ? 0 : rest < GROUP ? rest : int64_t(GROUP);
        read_row(source + g * GROUP * size_of(source_format), source_format, count, row);
        float largest = 0, poison = 0;  // a weight that is not finite makes the scale NaN
        for (int64_t i = 0; i < count; ++i) {
            largest = std::fmax(largest, std::fabs(row[i]));
            poison += row[i] * 0;
        }
        uint8_t* group = matrix.data + (place.panel * (matrix.padded_in / GROUP) + g) * GROUP_BYTES;
        const float scale = largest / 127 + poison;
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; ++i) {
            const int32_t value = i < count && scale > 0 ? int32_t(std::fmin(std::nearbyint(row[i] / scale), 127.0f)) : 0;
            group[256 + (i / 4) * 128 + place.lane * 4 + i % 4] = uint8_t(int8_t(value));
            sum += value;
        }
        std::memcpy(group + place.lane * 4, &scale, 4);
        std::memcpy(group + 128 + place.lane * 4, &sum, 4);
    }
}

}  // namespace

void read_row(const uint8_t* from, int32_t format, int64_t count, float* to) { kernels().read_row(from, format, count, to); }
void write_row(uint8_t* to, int32_t format, int64_t count, const float* from) { kernels().write_row(to, format, count, from); }

int64_t size_of(int32_t format) { return format == FR_F32 ? 4 : format == FR_BF16 ? 2 : 1; }

Lane lane_of(const fr_matrix& matrix, int64_t output, int32_t part) {
    if (matrix.gated) return {output / 16, part * 16 + output % 16};
    return {output / PANEL, output % PANEL};
}

void pack_row(const fr_matrix& matrix, const uint8_t* source, int32_t source_format, Lane place) {
    if (matrix.format == FR_INT8) pack_int8(matrix, source, source_format, place);
    else pack_floats(matrix, source, source_format, place);
}

float unpacked(const fr_matrix& matrix, Lane place, int64_t k) {
    float value;
    if (matrix.format == FR_INT8) {
        const uint8_t* group = matrix.data + (place.panel * (matrix.padded_in / GROUP) + k / GROUP) * GROUP_BYTES;
        std::memcpy(&value, group + place.lane * 4, 4);
        return value * float(int8_t(group[256 + (k % GROUP / 4) * 128 + place.lane * 4 + k % 4]));
    }
    const uint8_t* at = matrix.data + place.panel * matrix.padded_in * PANEL * size_of(matrix.format) + place.lane * 4;
    if (matrix.format == FR_F32) {
        std::memcpy(&value, at + k * 128, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, at + (k / 2) * 128 + (k % 2) * 2, 2);
    return from_bf16(half);
}

FR_API int64_t fr_packed_bytes(int32_t format, int32_t gated, int64_t out, int64_t in) {
    const int64_t panels = panels_of(fr_matrix{format, gated, out, in, 0, nullptr, nullptr}), columns = padded(format, in);
    if (format == FR_INT8) return panels * (columns / GROUP) * GROUP_BYTES;
    return panels * PANEL * columns * size_of(format);
}

Inputs inputs_for(const fr_matrix& matrix, int64_t tokens, InputRoom& room) {
    Inputs x;
    x.format = matrix.format;
    x.stride = matrix.padded_in * size_of(matrix.format) + 64;
    x.data = room.data[matrix.format].get<uint8_t>(tokens * x.stride);
    if (matrix.format == FR_INT8) {
        x.scale_stride = matrix.padded_in / GROUP;
        x.scales = room.scales.get<float>(tokens * x.scale_stride);
    }
    return x;
}

void clear_padding(const Inputs& x, int64_t tokens, int64_t written, int64_t read) {
    if (x.format == FR_INT8 || written >= read) return;  // `emit` pads int8 rows itself
    const int64_t size = size_of(x.format);
    for (int64_t t = 0; t < tokens; ++t) std::memset(x.data + t * x.stride + written * size, 0, size_t((read - written) * size));
}

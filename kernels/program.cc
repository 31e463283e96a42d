// The C ABI: choosing an instruction set, packing weights, single operations, and the forward of a transformer.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "forerun_kernels.h"
#include "team.h"
#include "work.h"

namespace {

// ---- instruction sets

int32_t best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return FR_AVX512_BF16;
    if (avx512) return FR_AVX512;
    if (avx2) return FR_AVX2;
#endif
    return FR_PORTABLE;
}

const Kernels* const every[] = {&portable_kernels, &avx2_kernels, &avx512_kernels, &avx512_bf16_kernels};
int32_t active = best_isa();

const Kernels& kernels() { return *every[active]; }

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

void read_row(const uint8_t* from, int32_t format, int64_t count, float* to) {
    if (format == FR_F32) std::memcpy(to, from, size_t(count) * 4);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(reinterpret_cast<const uint16_t*>(from)[i]);
}

void write_row(uint8_t* to, int32_t format, int64_t count, const float* from) {
    if (format == FR_F32) std::memcpy(to, from, size_t(count) * 4);
    else
        for (int64_t i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = to_bf16(from[i]);
}

int64_t size_of(int32_t format) { return format == FR_F32 ? 4 : format == FR_BF16 ? 2 : 1; }

// ---- packed weights

struct Lane {
    int64_t panel, lane;
};

Lane lane_of(const fr_matrix& matrix, int64_t output, int32_t part) {
    if (matrix.gated) return {output / 16, part * 16 + output % 16};
    return {output / PANEL, output % PANEL};
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
        float largest = 0;
        for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(row[i]));
        uint8_t* group = matrix.data + (place.panel * (matrix.padded_in / GROUP) + g) * GROUP_BYTES;
        const float scale = largest / 127;
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; ++i) {
            const int32_t value = i < count && scale > 0 ? int32_t(std::nearbyint(row[i] / scale)) : 0;
            group[256 + (i / 4) * 128 + place.lane * 4 + i % 4] = uint8_t(int8_t(value));
            sum += value;
        }
        std::memcpy(group + place.lane * 4, &scale, 4);
        std::memcpy(group + 128 + place.lane * 4, &sum, 4);
    }
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

// ---- inputs of products

// Room for `tokens` inputs of `matrix`. Rows are a cache line longer than needed, or equal columns would share cache sets.
Inputs inputs_for(const fr_matrix& matrix, int64_t tokens, Scratch& data, Scratch& scales) {
    Inputs x;
    x.format = matrix.format;
    x.stride = matrix.padded_in * size_of(matrix.format) + 64;
    x.data = data.get<uint8_t>(tokens * x.stride);
    if (matrix.format == FR_INT8) {
        x.scale_stride = matrix.padded_in / GROUP;
        x.scales = scales.get<float>(tokens * x.scale_stride);
    }
    return x;
}

// Zeros between the end of what will be written and the end of what is read.
void clear_padding(const Inputs& x, int64_t tokens, int64_t written, int64_t read) {
    if (x.format == FR_INT8 || written >= read) return;  // `emit` pads int8 rows itself
    const int64_t size = size_of(x.format);
    for (int64_t t = 0; t < tokens; ++t) std::memset(x.data + t * x.stride + written * size, 0, size_t((read - written) * size));
}

}  // namespace

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::bytes(int64_t count) {
    const int64_t wanted = round_up(count, 64) + 256;
    if (wanted > size_) {
        std::free(memory_);
        memory_ = std::aligned_alloc(64, size_t(wanted));
        if (!memory_) throw std::bad_alloc();
        size_ = wanted;
    }
    return memory_;
}

Step* Workspace::begin(int32_t threads, int64_t steps) {
    if (int32_t(own.size()) < threads) own = std::vector<Shelf>(size_t(threads));
    Step* first = steps_.get<Step>(steps);
    for (int64_t i = 0; i < steps; ++i) new (first + i) Step();
    return first;
}

void Tokens::read(const fr_feed& feed) {
    list.clear();
    row_begin.assign(1, 0);
    const int64_t scratch = feed.held + feed.count;
    paths.resize(feed.sees ? size_t(int64_t(feed.rows) * feed.count * scratch) : 0);
    for (int32_t row = 0; row < feed.rows; ++row) {
        for (int32_t i = 0; i < feed.counts[row]; ++i) {
            const int32_t place = row * feed.count + i, length = feed.lengths[row];
            Token token{row, feed.start + row, place, length + feed.held + i, length, length + feed.held + i,
                        feed.positions[place], nullptr, feed.tokens ? feed.tokens[place] : 0};
            if (feed.sees) {
                int32_t* path = paths.data() + place * scratch;
                const uint8_t* sees = feed.sees + place * scratch;
                int32_t depth = 0;
                for (int32_t s = 0; s < scratch; ++s)
                    if (sees[s]) path[depth++] = length + s;
                token.path = path;
                token.logical = length + depth - 1;
            }
            list.push_back(token);
        }
        row_begin.push_back(int32_t(list.size()));
    }
}

namespace {

// ---- the forward of a transformer

class Forward {
  public:
    Forward(const fr_transformer& model, const fr_feed& feed, const fr_cache& cache, const fr_wanted& wanted, Workspace& work,
            int32_t threads)
        : model_(model), cache_(cache), wanted_(wanted), work_(work), tokens_(work.tokens), feed_(feed) {
        tokens_.read(feed);
        count_ = tokens_.count();
        auto& memory = work.shared.memory;
        stride_ = round_up(model.width, PANEL);
        qkv_stride_ = round_up((model.heads + 2 * model.kv_heads) * model.head_dim, PANEL);
        residual_ = memory[0].get<float>(count_ * stride_);
        qkv_ = memory[1].get<float>(count_ * qkv_stride_);
        const fr_layer& layer = model.layer[0];
        normal_ = inputs_for(layer.qkv, count_, memory[2], memory[3]);
        mixed_ = inputs_for(layer.out, count_, memory[4], memory[5]);
        gated_ = inputs_for(layer.down, count_, memory[6], memory[7]);
        const int64_t widest = round_up(std::max<int64_t>(model.mlp_width, model.heads * model.head_dim), GROUP);
        floats_ = layer.down.format == FR_INT8 ? memory[8].get<float>(count_ * widest) : nullptr;
        floats_stride_ = widest;
        choose_scored();
        final_ = inputs_for(model.head, int64_t(scored_.size()), memory[9], memory[10]);
        best_ = memory[11].get<float>(threads * int64_t(scored_.size()));
        best_at_ = memory[12].get<int64_t>(threads * int64_t(scored_.size()));
        for (int64_t i = 0; i < threads * int64_t(scored_.size()); ++i) {
            best_[i] = -std::numeric_limits<float>::infinity();
            best_at_[i] = 0;
        }
        partials_ = memory[13].get<float>(partial_floats(tokens_, cache, model.heads, threads));
        // A few tokens are normalised by every thread for itself: cheaper than waiting for one another.
        alone_ = count_ <= 4;
    }

    // Steps that a forward takes: at most twelve per layer, and a few around them. Shared memory is read and written in steps alone: a
    // thread that comes late may find that the others are layers ahead.
    static int64_t steps(const fr_transformer& model) { return 12 * int64_t(model.layers) + 10; }

    void run(Team team) {
        Shelf& own = work_.own[size_t(team.rank)];
        Inputs normal = normal_;
        if (alone_) {
            normal.data = own.memory[8].get<uint8_t>(count_ * normal.stride);
            normal.scales = own.memory[9].get<float>(count_ * normal.scale_stride);
        }
        begin(team);
        for (int32_t l = 0; l < model_.layers; ++l) {
            const fr_layer& layer = model_.layer[l];
            give_hidden(team, l);
            normalise(team, layer.attention_norm, normal, own);
            linear(team, layer.qkv, normal, qkv_, qkv_stride_, Into::store);
            attention(team, l, own);
            linear(team, layer.out, mixed_, residual_, stride_, Into::add);
            normalise(team, layer.mlp_norm, normal, own);
            Outputs gate{Into::gated, floats_, floats_stride_, &gated_};
            kernels().linear(team, layer.gate_up, normal, count_, gate);
            requantise(team, model_.mlp_width, gated_);
            linear(team, layer.down, gated_, residual_, stride_, Into::add);
        }
        score(team, own);
    }

    void finish(int32_t threads) {
        if (!wanted_.best) return;
        const int64_t count = int64_t(scored_.size());
        for (int64_t i = 0; i < count; ++i) {
            float best = best_[i];
            int64_t at = best_at_[i];
            for (int32_t r = 1; r < threads; ++r) {
                const float other = best_[r * count + i];
                const int64_t other_at = best_at_[r * count + i];
                const bool nan = best != best, other_nan = other != other;
                const bool equal = other == best || (nan && other_nan);
                if (equal ? other_at < at : other_nan || (!nan && other > best)) best = other, at = other_at;
            }
            wanted_.best[places_[size_t(i)]] = at;
        }
    }

  private:
    void choose_scored() {
        for (int64_t t = 0; t < count_; ++t) {
            const Token& token = tokens_.list[size_t(t)];
            const int32_t in_row = token.place - token.row * feed_.count;
            if (wanted_.last && wanted_.last[token.row] != in_row) continue;
            scored_.push_back(int32_t(t));
            places_.push_back(wanted_.last ? token.row : token.place);
        }
    }

    void begin(Team& team) {
        team.each(count_, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) embed(tokens_.list[size_t(t)].id, residual_ + t * stride_);
            if (first > 0) return;
            clear_padding(mixed_, count_, model_.heads * model_.head_dim, model_.layer[0].out.padded_in);
            clear_padding(gated_, count_, round_up(model_.mlp_width, 16), model_.layer[0].down.padded_in);
            clear_unscored();
        });
    }

    void embed(int64_t id, float* row) {
        if (model_.embedding) {
            const int64_t bytes = size_of(model_.embedding_format) * model_.width;
            read_row(model_.embedding + id * bytes, model_.embedding_format, model_.width, row);
        } else {
            const Lane lane = lane_of(model_.head, id, 0);
            for (int64_t k = 0; k < model_.width; ++k) row[k] = unpacked(model_.head, lane, k);
        }
        for (int64_t k = model_.width; k < stride_; ++k) row[k] = 0;
    }

    // Padding tokens get zeros, so that nothing downstream reads what was never written.
    void clear_unscored() {
        if (count_ == int64_t(feed_.rows) * feed_.count) return;
        if (!wanted_.last) {
            for (int32_t row = 0; row < feed_.rows; ++row) {
                const int64_t from = int64_t(row) * feed_.count + feed_.counts[row], n = feed_.count - feed_.counts[row];
                if (wanted_.logits) std::memset(wanted_.logits + from * model_.vocabulary, 0, size_t(n * model_.vocabulary) * 4);
                if (wanted_.best) std::memset(wanted_.best + from, 0, size_t(n) * 8);
            }
        }
        for (int32_t h = 0; h < wanted_.hidden_count; ++h) {
            const int64_t bytes = size_of(wanted_.hidden_format) * model_.width;
            for (int32_t row = 0; row < feed_.rows; ++row) {
                const int64_t from = int64_t(row) * feed_.count + feed_.counts[row], n = feed_.count - feed_.counts[row];
                std::memset(wanted_.hidden[h] + from * bytes, 0, size_t(n * bytes));
            }
        }
    }

    void give_hidden(Team& team, int32_t layer) {
        for (int32_t h = 0; h < wanted_.hidden_count; ++h) {
            if (wanted_.hidden_layers[h] != layer) continue;
            team.each(count_, team.grain(count_, 1), [&](int64_t first, int64_t last) {
                for (int64_t t = first; t < last; ++t) write_hidden(h, t, residual_ + t * stride_);
            });
        }
    }

    void write_hidden(int32_t h, int64_t token, const float* row) {
        const int64_t bytes = size_of(wanted_.hidden_format) * model_.width;
        write_row(wanted_.hidden[h] + tokens_.list[size_t(token)].place * bytes, wanted_.hidden_format, model_.width, row);
    }

    void normalise(Team& team, const float* weight, Inputs& to, Shelf& own) {
        float* row = own.memory[7].get<float>(stride_);
        auto some = [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                kernels().norm(residual_ + t * stride_, weight, nullptr, row, model_.width, model_.norm_eps, false);
                kernels().emit(row, model_.width, to, t);
            }
        };
        if (alone_) some(0, count_);
        else team.each(count_, team.grain(count_, 4), some);
    }

    void linear(Team& team, const fr_matrix& matrix, const Inputs& x, float* to, int64_t stride, Into into) {
        kernels().linear(team, matrix, x, count_, Outputs{into, to, stride});
    }

    void attention(Team& team, int32_t layer, Shelf& own) {
        const fr_layer& l = model_.layer[layer];
        const AttentionCall call{&tokens_, &cache_, layer, model_.heads, l.window, model_.scale, qkv_, qkv_stride_,
                                 model_.cos, model_.sin, l.q_norm, l.k_norm, model_.norm_eps, nullptr, &mixed_, floats_,
                                 floats_stride_, partials_};
        kernels().attention(team, call, own);
        requantise(team, model_.heads * model_.head_dim, mixed_);
    }

    // For int8 products: rows of fp32 -> bytes and scales.
    void requantise(Team& team, int64_t width, Inputs& to) {
        if (!floats_) return;
        team.each(count_, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) kernels().emit(floats_ + t * floats_stride_, width, to, t);
        });
    }

    void score(Team& team, Shelf& own) {
        float* row = own.memory[7].get<float>(stride_);
        auto normal = [&](int64_t t) {
            kernels().norm(residual_ + t * stride_, model_.final_norm, nullptr, row, model_.width, model_.norm_eps, false);
        };
        for (int32_t h = 0; h < wanted_.hidden_count; ++h) {
            if (wanted_.hidden_layers[h] != model_.layers) continue;
            for (int64_t t = team.rank; t < count_; t += team.size) {
                normal(t);
                write_hidden(h, t, row);
            }
        }
        if (!wanted_.logits) return;
        const int64_t count = int64_t(scored_.size());
        team.each(count, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                normal(scored_[size_t(i)]);
                kernels().emit(row, model_.width, final_, i);
            }
        });
        Outputs to{Into::logits, wanted_.logits, 0, nullptr, places_.data(), model_.vocabulary, wanted_.best ? best_ : nullptr, best_at_};
        kernels().linear(team, model_.head, final_, count, to);
    }

    const fr_transformer& model_;
    const fr_cache& cache_;
    const fr_wanted& wanted_;
    Workspace& work_;
    Tokens& tokens_;
    const fr_feed& feed_;
    int64_t count_, stride_, qkv_stride_, floats_stride_;
    float *residual_, *qkv_, *floats_, *best_, *partials_;
    int64_t* best_at_;
    Inputs normal_, mixed_, gated_, final_;
    std::vector<int32_t> scored_, places_;
    bool alone_;
};

Workspace& workspace() {
    static thread_local Workspace work;
    return work;
}

}  // namespace

// ---- the C ABI

FR_API int32_t fr_version() { return 1; }
FR_API int32_t fr_isa_best() { return best_isa(); }
FR_API int32_t fr_isa_active() { return active; }
FR_API int32_t fr_isa_use(int32_t isa) {
    if (isa < FR_PORTABLE || isa > best_isa()) return 0;
    active = isa;
    return 1;
}

FR_API int64_t fr_packed_bytes(int32_t format, int32_t gated, int64_t out, int64_t in) {
    const int64_t panels = panels_of(fr_matrix{format, gated, out, in, 0, nullptr, nullptr}), columns = padded(format, in);
    if (format == FR_INT8) return panels * (columns / GROUP) * GROUP_BYTES;
    return panels * PANEL * columns * size_of(format);
}

FR_API void fr_pack(const fr_matrix* matrix, const uint8_t* source, int32_t source_format, int64_t at, int64_t count, int32_t part,
                    int32_t threads) {
    together(threads, workspace().begin(threads, 1), [&](Team team) {
        team.each(count, 16, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; ++n) {
                const uint8_t* row = source + n * matrix->in * size_of(source_format);
                const Lane place = lane_of(*matrix, at + n, part);
                if (matrix->format == FR_INT8) pack_int8(*matrix, row, source_format, place);
                else pack_floats(*matrix, row, source_format, place);
            }
        });
    });
}

FR_API void fr_unpack(const fr_matrix* matrix, float* rows, int64_t at, int64_t count, int32_t part) {
    for (int64_t n = 0; n < count; ++n)
        for (int64_t k = 0; k < matrix->in; ++k) rows[n * matrix->in + k] = unpacked(*matrix, lane_of(*matrix, at + n, part), k);
}

FR_API void fr_linear(const fr_matrix* matrix, const uint8_t* x, const uint8_t* residual, uint8_t* y, int32_t format, int64_t tokens,
                      int32_t threads) {
    Workspace& work = workspace();
    Step* steps = work.begin(threads, 3);
    auto& memory = work.shared.memory;
    Inputs inputs = inputs_for(*matrix, tokens, memory[0], memory[1]);
    const int64_t out = matrix->out, stride = round_up(out, PANEL);
    float* sums = memory[2].get<float>(tokens * stride);
    const Outputs to{matrix->gated ? Into::gated : residual ? Into::add : Into::store, sums, stride};
    together(threads, steps, [&](Team team) {
        float* row = work.own[size_t(team.rank)].memory[7].get<float>(matrix->in);
        team.each(tokens, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                read_row(x + t * matrix->in * size_of(format), format, matrix->in, row);
                kernels().emit(row, matrix->in, inputs, t);
                if (!residual) continue;
                std::memset(sums + t * stride, 0, size_t(stride) * 4);
                read_row(residual + t * out * size_of(format), format, out, sums + t * stride);
            }
        });
        kernels().linear(team, *matrix, inputs, tokens, to);
        team.each(tokens, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) write_row(y + t * out * size_of(format), format, out, sums + t * stride);
        });
    });
}

// `body(in, out)` for every row of x: fp32 copies, `in_width` wide and `out_width` wide.
template <class Body>
static void for_rows(const uint8_t* x, uint8_t* y, int32_t format, int64_t rows, int64_t in_width, int64_t out_width, int32_t threads,
                     Body&& body) {
    Workspace& work = workspace();
    together(threads, work.begin(threads, 1), [&](Team team) {
        Shelf& own = work.own[size_t(team.rank)];
        float *in = own.memory[7].get<float>(in_width), *out = own.memory[8].get<float>(out_width);
        team.each(rows, team.grain(rows, 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                read_row(x + t * in_width * size_of(format), format, in_width, in);
                body(in, out);
                write_row(y + t * out_width * size_of(format), format, out_width, out);
            }
        });
    });
}

FR_API void fr_norm(const uint8_t* x, const float* weight, const float* bias, uint8_t* y, int32_t format, int64_t tokens, int64_t width,
                    float eps, int32_t centred, int32_t threads) {
    for_rows(x, y, format, tokens, width, width, threads,
             [&](const float* in, float* out) { kernels().norm(in, weight, bias, out, width, eps, centred != 0); });
}

FR_API void fr_silu_gate(const uint8_t* gate_up, uint8_t* y, int32_t format, int64_t tokens, int64_t width, int32_t threads) {
    for_rows(gate_up, y, format, tokens, 2 * width, width, threads,
             [&](const float* in, float* out) { kernels().silu_gate(in, out, width); });
}

FR_API void fr_attention(const uint8_t* q, const fr_feed* feed, const fr_cache* cache, int32_t layer, int32_t heads, int32_t window,
                         float scale, uint8_t* y, int32_t threads) {
    Workspace& work = workspace();
    Step* steps = work.begin(threads, 5);
    work.tokens.read(*feed);
    const int64_t width = int64_t(heads) * cache->head_dim, count = work.tokens.count();
    const int64_t bytes = width * size_of(cache->format);
    float* mixed = work.shared.memory[0].get<float>(count * width);
    float* partials = work.shared.memory[1].get<float>(partial_floats(work.tokens, *cache, heads, threads));
    const AttentionCall call{&work.tokens, cache, layer, heads, window, scale, nullptr, 0, nullptr, nullptr, nullptr, nullptr, 0, q,
                             nullptr, mixed, width, partials};
    std::memset(y, 0, size_t(int64_t(feed->rows) * feed->count * bytes));
    together(threads, steps, [&](Team team) {
        kernels().attention(team, call, work.own[size_t(team.rank)]);
        team.each(count, team.grain(count, 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t)
                write_row(y + work.tokens.list[size_t(t)].place * bytes, cache->format, width, mixed + t * width);
        });
    });
}

FR_API void fr_top(const float* logits, int64_t tokens, int64_t vocabulary, int32_t k, float* values, int64_t* indices,
                   float* logsumexp, int32_t threads) {
    together(threads, workspace().begin(threads, 1), [&](Team team) {
        team.each(tokens, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t)
                kernels().top(logits + t * vocabulary, vocabulary, k, values + t * k, indices + t * k, logsumexp + t);
        });
    });
}

FR_API void fr_forward(const fr_transformer* model, const fr_feed* feed, const fr_cache* cache, const fr_wanted* wanted,
                       int32_t threads) {
    Workspace& work = workspace();
    Step* steps = work.begin(threads, Forward::steps(*model));
    Forward forward(*model, *feed, *cache, *wanted, work, threads);
    together(threads, steps, [&](Team team) { forward.run(team); });
    forward.finish(threads);
}

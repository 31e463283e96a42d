// The C ABI: choosing an instruction set, packing weights, single operations. The forward of a transformer is in forward.cc.
#include <cstring>

#include "cpu.h"
#include "formats.h"

namespace {

const Kernels* const every[] = {&portable_kernels, &avx2_kernels, &avx512_kernels, &avx512_bf16_kernels, &amx_kernels};
int32_t active = best_isa();

}  // namespace

const Kernels& kernels() { return *every[active]; }

FR_API void fr_sizes(int32_t* sizes) {
    const size_t all[] = {sizeof(fr_matrix), sizeof(fr_feed), sizeof(fr_cache), sizeof(fr_layer), sizeof(fr_transformer), sizeof(fr_wanted),
                          sizeof(fr_head), sizeof(fr_heads), sizeof(fr_level), sizeof(fr_tree),   sizeof(fr_cursor), sizeof(fr_view),
                          sizeof(fr_corpus), sizeof(fr_corpus_wish), sizeof(fr_corpus_draft), sizeof(fr_block), sizeof(fr_block_states), sizeof(fr_block_wish),
                          sizeof(fr_block_trees), sizeof(fr_filter), sizeof(fr_proposal)};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i) sizes[i] = int32_t(all[i]);
}
FR_API int32_t fr_isa_best() { return best_isa(); }
FR_API int32_t fr_isa_active() { return active; }
FR_API int32_t fr_isa_use(int32_t isa) {
    if (isa < FR_PORTABLE || isa > best_isa()) return 0;
    active = isa;
    return 1;
}

FR_API void fr_pack(const fr_matrix* matrix, const uint8_t* source, int32_t source_format, int64_t at, int64_t count, int32_t part,
                    int32_t threads) {
    together(threads, workspace().begin(threads, 1), [&](Team team) {
        team.each(count, 16, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; ++n) {
                pack_row(*matrix, source + n * matrix->in * size_of(source_format), source_format, lane_of(*matrix, at + n, part));
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
    Inputs inputs = inputs_for(*matrix, tokens, work.shared.normal);
    const int64_t out = matrix->out, stride = round_up(out, PANEL);
    float* sums = work.shared.floats.get<float>(tokens * stride);
    const Outputs to{matrix->gated ? Into::gated : residual ? Into::add : Into::store, sums, stride};
    together(threads, steps, [&](Team team) {
        float* row = work.own[size_t(team.rank)].row.get<float>(matrix->in);
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
        float *in = own.row.get<float>(in_width), *out = own.second_row.get<float>(out_width);
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

FR_API int32_t fr_attention(const uint8_t* q, const fr_feed* feed, const fr_cache* cache, int32_t layer, int32_t heads, int32_t window,
                            float scale, uint8_t* y, int32_t threads) {
    if (!paths_hold(*feed)) return FR_BAD_PATH;
    Workspace& work = workspace();
    Step* steps = work.begin(threads, 5);
    work.tokens.read(*feed);
    const int64_t width = int64_t(heads) * cache->head_dim, count = work.tokens.count();
    const int64_t bytes = width * size_of(cache->format);
    float* mixed = work.shared.floats.get<float>(count * width);
    float* partials = work.shared.partials.get<float>(partial_floats(work.tokens, *cache, heads, threads));
    const AttentionCall call{.tokens = &work.tokens,
                             .cache = cache,
                             .layer = layer,
                             .heads = heads,
                             .window = window,
                             .scale = scale,
                             .q = q,
                             .out_floats = mixed,
                             .out_stride = width,
                             .partials = partials};
    std::memset(y, 0, size_t(int64_t(feed->rows) * feed->count * bytes));
    together(threads, steps, [&](Team team) {
        kernels().attention(team, call, work.own[size_t(team.rank)]);
        team.each(count, team.grain(count, 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t)
                write_row(y + work.tokens.list[size_t(t)].place * bytes, cache->format, width, mixed + t * width);
        });
    });
    return FR_FINE;
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

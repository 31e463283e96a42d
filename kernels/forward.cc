// The forward of a transformer, in one call.
#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "formats.h"

namespace {

class Forward {
  public:
    Forward(const fr_transformer& model, const fr_feed& feed, const fr_cache& cache, const fr_wanted& wanted, Workspace& work,
            int32_t threads)
        : model_(model), cache_(cache), wanted_(wanted), work_(work), tokens_(work.tokens), feed_(feed) {
        tokens_.read(feed);
        count_ = tokens_.count();
        Shared& room = work.shared;
        stride_ = round_up(model.width, PANEL);
        qkv_stride_ = round_up((model.heads + 2 * model.kv_heads) * model.head_dim, PANEL);
        residual_ = room.residual.get<float>(count_ * stride_);
        qkv_ = room.qkv.get<float>(count_ * qkv_stride_);
        // A few tokens are normalised by every thread for itself: cheaper than waiting for one another.
        alone_ = count_ <= 4;
        const int64_t heads_width = model.heads * model.head_dim;
        for (int32_t l = 0; l < model.layers; ++l) {
            const fr_layer& layer = model.layer[l];
            if (!alone_) make_room(normal_, layer.qkv, room.normal, layer.qkv.padded_in);
            if (!alone_) make_room(normal_, layer.gate_up, room.normal, layer.gate_up.padded_in);
            make_room(mixed_, layer.out, room.mixed, heads_width);
            make_room(gated_, layer.down, room.gated, round_up(model.mlp_width, 16));
        }
        const int64_t widest = round_up(std::max<int64_t>(model.mlp_width, heads_width), GROUP);
        floats_ = mixed_[FR_INT8].data || gated_[FR_INT8].data ? room.floats.get<float>(count_ * widest) : nullptr;
        floats_stride_ = widest;
        choose_scored();
        final_ = inputs_for(model.head, int64_t(scored_.size()), room.final);
        best_ = room.best.get<float>(threads * int64_t(scored_.size()));
        best_at_ = room.best_at.get<int64_t>(threads * int64_t(scored_.size()));
        for (int64_t i = 0; i < threads * int64_t(scored_.size()); ++i) {
            best_[i] = -std::numeric_limits<float>::infinity();
            best_at_[i] = 0;
        }
        partials_ = room.partials.get<float>(partial_floats(tokens_, cache, model.heads, threads));
        if (int64_t(scored_.size()) < int64_t(feed.rows) * (wanted.last ? 1 : feed.count) || count_ < int64_t(feed.rows) * feed.count)
            clear_padding_tokens();
    }

    // Steps that a forward takes: at most twelve per layer, and a few around them. Shared memory is read and written in steps alone: a
    // thread that comes late may find that the others are layers ahead.
    static int64_t steps(const fr_transformer& model) { return 12 * int64_t(model.layers) + 10; }

    void run(Team& team) {
        Shelf& own = work_.own[size_t(team.rank)];
        begin(team);
        for (int32_t l = 0; l < model_.layers; ++l) {
            const fr_layer& layer = model_.layer[l];
            give_hidden(team, l);
            from_norm(team, layer.attention_norm, layer.qkv, {Into::store, qkv_, qkv_stride_}, own);
            attention(team, l, own);
            linear(team, layer.out, mixed_, residual_, stride_, Into::add);
            Inputs& gated = gated_[layer.down.format];
            const bool rounds = gated.format == FR_INT8;
            from_norm(team, layer.mlp_norm, layer.gate_up,
                      {Into::gated, rounds ? floats_ : nullptr, floats_stride_, rounds ? nullptr : &gated}, own);
            requantise(team, model_.mlp_width, gated);
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
            for (int64_t t = first; t < last; ++t) read_input(tokens_.list[size_t(t)], residual_ + t * stride_);
        });
    }

    void read_input(const Token& token, float* row) {
        if (feed_.states) {
            const int64_t bytes = size_of(feed_.states_format) * model_.width;
            read_row(feed_.states + token.place * bytes, feed_.states_format, model_.width, row);
        } else if (model_.embedding) {
            const int64_t bytes = size_of(model_.embedding_format) * model_.width;
            read_row(model_.embedding + token.id * bytes, model_.embedding_format, model_.width, row);
        } else {
            const Lane lane = lane_of(model_.head, token.id, 0);
            for (int64_t k = 0; k < model_.width; ++k) row[k] = unpacked(model_.head, lane, k);
        }
        for (int64_t k = model_.width; k < stride_; ++k) row[k] = 0;
    }

    // Padding gets zeros, so that nothing downstream reads what was never written.
    void clear_padding_tokens() {
        const int64_t rows = feed_.rows, scores = wanted_.last ? rows : rows * feed_.count;
        std::vector<char> scored(size_t(scores), 0);
        for (int32_t place : places_) scored[size_t(place)] = 1;
        for (int64_t place = 0; place < scores; ++place) {
            if (scored[size_t(place)]) continue;
            if (wanted_.logits) std::memset(wanted_.logits + place * model_.vocabulary, 0, size_t(model_.vocabulary) * 4);
            if (wanted_.best) wanted_.best[place] = 0;
        }
        const int64_t bytes = size_of(wanted_.hidden_format) * model_.width;
        for (int32_t h = 0; h < wanted_.hidden_count; ++h) {
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t padding = feed_.count - feed_.counts[row], from = row * feed_.count + feed_.counts[row];
                std::memset(wanted_.hidden[h] + from * bytes, 0, size_t(padding * bytes));
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

    // Room for the inputs of a matrix in its number format, `written` numbers of each; once for all layers that share it.
    void make_room(Inputs* by_format, const fr_matrix& matrix, InputRoom& room, int64_t written) {
        Inputs& x = by_format[matrix.format];
        if (x.data) return;
        x = inputs_for(matrix, count_, room);
        clear_padding(x, count_, written, matrix.padded_in);
    }

    // The product of a matrix with the norm of the residual.
    void from_norm(Team& team, const float* weight, const fr_matrix& matrix, const Outputs& to, Shelf& own) {
        float* row = own.row.get<float>(stride_);
        if (alone_) {
            const OwnNorm norm{residual_, stride_, weight, model_.width, model_.norm_eps, row};
            Inputs x = inputs_for(matrix, count_, own.normal);
            x.made_of = &norm;
            kernels().linear(team, matrix, x, count_, to);
            return;
        }
        Inputs& x = normal_[matrix.format];
        team.each(count_, team.grain(count_, 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                kernels().norm(residual_ + t * stride_, weight, nullptr, row, model_.width, model_.norm_eps, false);
                kernels().emit(row, model_.width, x, t);
            }
        });
        kernels().linear(team, matrix, x, count_, to);
    }

    void linear(Team& team, const fr_matrix& matrix, const Inputs* by_format, float* to, int64_t stride, Into into) {
        kernels().linear(team, matrix, by_format[matrix.format], count_, Outputs{into, to, stride});
    }

    void attention(Team& team, int32_t layer, Shelf& own) {
        const fr_layer& l = model_.layer[layer];
        Inputs& mixed = mixed_[l.out.format];
        const AttentionCall call{.tokens = &tokens_,
                                 .cache = &cache_,
                                 .layer = layer,
                                 .heads = model_.heads,
                                 .window = l.window,
                                 .scale = model_.scale,
                                 .qkv = qkv_,
                                 .qkv_stride = qkv_stride_,
                                 .cos = model_.cos,
                                 .sin = model_.sin,
                                 .q_norm = l.q_norm,
                                 .k_norm = l.k_norm,
                                 .eps = model_.norm_eps,
                                 .out = &mixed,
                                 .out_floats = mixed.format == FR_INT8 ? floats_ : nullptr,
                                 .out_stride = floats_stride_,
                                 .partials = partials_};
        kernels().attention(team, call, own);
        requantise(team, model_.heads * model_.head_dim, mixed);
    }

    // For int8 products: rows of fp32 -> bytes and scales.
    void requantise(Team& team, int64_t width, Inputs& to) {
        if (to.format != FR_INT8) return;
        team.each(count_, 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) kernels().emit(floats_ + t * floats_stride_, width, to, t);
        });
    }

    void score(Team& team, Shelf& own) {
        float* row = own.row.get<float>(stride_);
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
        if (!wanted_.logits || !model_.vocabulary) return;
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
    Inputs normal_[3], mixed_[3], gated_[3], final_;  // by number format
    std::vector<int32_t> scored_, places_;
    bool alone_;
};

}  // namespace

namespace {

// Whether everything stays inside the vocabulary, the cache and the tables.
int32_t checked(const fr_transformer& model, const fr_feed& feed, const fr_cache& cache) {
    if (feed.start < 0 || feed.start + feed.rows > cache.slots) return FR_BAD_PLACE;
    for (int32_t row = 0; row < feed.rows; ++row) {
        const int64_t end = int64_t(feed.lengths[row]) + feed.held + feed.counts[row];
        if (feed.counts[row] < 0 || feed.counts[row] > feed.count || feed.lengths[row] < 0 || end > cache.capacity) return FR_BAD_PLACE;
        for (int32_t i = 0; i < feed.counts[row]; ++i) {
            const int64_t place = int64_t(row) * feed.count + i;
            if (!feed.states && (feed.tokens[place] < 0 || feed.tokens[place] >= model.vocabulary)) return FR_BAD_TOKEN;
            if (feed.positions[place] < 0 || feed.positions[place] >= model.table_length) return FR_BAD_POSITION;
        }
    }
    return paths_hold(feed) ? FR_FINE : FR_BAD_PATH;
}

}  // namespace

int32_t forward(const fr_transformer& model, const fr_feed& feed, const fr_cache& cache, const fr_wanted& wanted, Afterwards* then,
                int32_t threads) {
    if (const int32_t error = checked(model, feed, cache)) return error;
    try {
        Workspace& work = workspace();
        Step* steps = work.begin(threads, Forward::steps(model) + (then ? then->steps() : 0));
        Forward forward(model, feed, cache, wanted, work, threads);
        together(threads, steps, [&](Team team) {
            forward.run(team);
            if (then) then->run(team);
        });
        forward.finish(threads);
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
    return FR_FINE;
}

FR_API int32_t fr_forward(const fr_transformer* model, const fr_feed* feed, const fr_cache* cache, const fr_wanted* wanted,
                          int32_t threads) {
    return forward(*model, *feed, *cache, *wanted, nullptr, threads);
}

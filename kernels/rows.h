// Operations on single rows of fp32: loading and storing their ends, writing them as inputs of a product, norms, gates, the largest.

static inline V load_some(const float* p, int64_t count) {
    if (count >= 16) return load(p);
    float f[16] = {0};
    for (int64_t i = 0; i < count; ++i) f[i] = p[i];
    return load(f);
}

// The first lanes, zeros behind them: padding must not keep a NaN for a later token.
static inline V first_of(V x, int64_t count) {
    if (count >= 16) return x;
    float f[16];
    store(f, x);
    return load_some(f, count);
}

static inline void store_some(float* p, V x, int64_t count) {
    if (count >= 16) return store(p, x);
    float f[16];
    store(f, x);
    for (int64_t i = 0; i < count; ++i) p[i] = f[i];
}

template <int F>
static void store_row(uint8_t* to, const float* row, int64_t width) {
    if (F == FR_F32) {
        __builtin_memcpy(to, row, size_t(width) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) to_bf16((uint16_t*)to + i, load(row + i));
    if (i < width) {
        uint16_t rest[16];
        to_bf16(rest, load_some(row + i, width - i));
        __builtin_memcpy((uint16_t*)to + i, rest, size_t(width - i) * 2);
    }
}

// Rows of bf16 or fp32 to and from fp32.
static void read_row(const uint8_t* from, int32_t format, int64_t count, float* to) {
    if (format == FR_F32) {
        __builtin_memcpy(to, from, size_t(count) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, from_bf16((const uint16_t*)from + i));
    for (; i < count; ++i) {
        const uint32_t bits = uint32_t(((const uint16_t*)from)[i]) << 16;
        __builtin_memcpy(to + i, &bits, 4);
    }
}
static void write_row(uint8_t* to, int32_t format, int64_t count, const float* from) {
    if (format == FR_F32) store_row<FR_F32>(to, from, count);
    else store_row<FR_BF16>(to, from, count);
}

// One group of 128 as unsigned bytes around 128: value = (byte - 128) * scale. NaN and infinity make the scale NaN.
static void quantise(const float* x, int64_t count, uint8_t* bytes, float* scale) {
    V most = zero(), poison = zero();
    for (int64_t i = 0; i < count; i += 16) {
        V value = load_some(x + i, count - i);
        most = larger(larger(value, sub(zero(), value)), most);
        poison = fma(value, zero(), poison);
    }
    const float largest = largest_of(most);
    const float per_unit = largest > 0 ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f + sum_of(poison);
    for (int64_t i = 0; i < GROUP; i += 16) {
        float f[16];
        store(f, round_to_int(mul(i < count ? load_some(x + i, count - i) : zero(), all(per_unit))));
        for (int j = 0; j < 16; ++j) bytes[i + j] = uint8_t(int32_t(f[j] >= -127 && f[j] <= 127 ? f[j] : 0) + 128);
    }
}

// Write a row of fp32 as input number `token` of a product, zeros behind it.
static void emit(const float* row, int64_t width, Inputs& to, int64_t token) {
    uint8_t* data = to.data + token * to.stride;
    if (to.format == FR_INT8) {
        for (int64_t g = 0; g * GROUP < width; ++g) {
            const int64_t rest = width - g * GROUP;
            quantise(row + g * GROUP, rest < GROUP ? rest : int64_t(GROUP), data + g * GROUP, to.scales + token * to.scale_stride + g);
        }
        return;
    }
    const int64_t padded = (width + PANEL - 1) / PANEL * PANEL;
    for (int64_t i = 0; i < padded; i += 16) {
        V x = i < width ? load_some(row + i, width - i) : zero();
        if (to.format == FR_BF16) to_bf16((uint16_t*)data + i, x);
        else store((float*)data + i, x);
    }
}

static void norm(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps, bool centred) {
    V mean = zero();
    if (centred) {
        V sum = zero();
        for (int64_t i = 0; i < width; i += 16) sum = add(sum, load_some(x + i, width - i));
        mean = all(sum_of(sum) / float(width));
    }
    V squares = zero();
    for (int64_t i = 0; i < width; i += 16) {
        V value = load_some(x + i, width - i);
        if (centred) value = width - i >= 16 ? sub(value, mean) : sub(value, load_some((const float*)&mean, width - i));
        squares = fma(value, value, squares);
    }
    const V scale = all(1.0f / __builtin_sqrtf(sum_of(squares) / float(width) + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t rest = width - i;
        V value = mul(mul(sub(load_some(x + i, rest), mean), scale), load_some(weight + i, rest));
        if (bias) value = add(value, load_some(bias + i, rest));
        store_some(y + i, value, rest);
    }
}

static void silu_gate(const float* gate_up, float* y, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) {
        V gate = load_some(gate_up + i, width - i), up = load_some(gate_up + width + i, width - i);
        store_some(y + i, mul(silu(gate), up), width - i);
    }
}

// Offer a value for a list of the k largest. Indices come in ascending order, so an equal value never displaces an earlier one.
template <class Index>
static inline void offer(float value, Index index, int32_t k, int32_t& held, float* values, Index* indices) {
    if (held == k && !(value > values[k - 1])) return;
    int32_t place = held < k ? held++ : k - 1;
    for (; place > 0 && value > values[place - 1]; --place) {
        values[place] = values[place - 1];
        indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
}

// The largest of every LANES-th logit; a NaN counts as minus infinity.
constexpr int32_t LANES = 32;
static void largest_by_lane(const float* logits, int64_t vocabulary, float* most) {
    V low = all(-__builtin_inff()), high = low;
    const int64_t whole = vocabulary / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        low = larger(load(logits + i), low);
        high = larger(load(logits + i + 16), high);
    }
    store(most, low);
    store(most + 16, high);
    for (int64_t i = whole; i < vocabulary; ++i)
        if (logits[i] > most[i - whole]) most[i - whole] = logits[i];
}

// The k-th largest of the lanes, than which k logits are no smaller; minus infinity for larger k.
static float kth_largest(const float* most, int32_t k) {
    float values[LANES];
    int32_t ignored[LANES], held = 0;
    if (k > LANES) return -__builtin_inff();
    for (int32_t i = 0; i < LANES; ++i) offer(most[i], i, k, held, values, ignored);
    return values[k - 1];
}

static void top(const float* logits, int64_t vocabulary, int32_t k, float* values, int64_t* indices, float* logsumexp) {
    const V nothing = all(-__builtin_inff());
    float most[LANES];
    largest_by_lane(logits, vocabulary, most);
    const float largest = largest_of(larger(load(most), load(most + 16))), least = kth_largest(most, k);
    const bool everything = least == -__builtin_inff();
    int32_t held = 0;
    for (int64_t i = 0; i < vocabulary; i += LANES) {
        const int64_t end = vocabulary - i < LANES ? vocabulary : i + LANES;
        if (end - i == LANES) {
            const float best = largest_of(larger(load(logits + i), larger(load(logits + i + 16), nothing)));
            if (best < least || (held == k && !(best > values[k - 1]))) continue;
        }
        for (int64_t j = i; j < end; ++j)
            if (everything || logits[j] >= least) offer(logits[j], j, k, held, values, indices);
    }
    if (largest == __builtin_inff() || largest == -__builtin_inff()) {
        *logsumexp = largest;
        return;
    }
    V sum = zero();
    for (int64_t i = 0; i < vocabulary; i += 16) {
        V x = exponential(sub(load_some(logits + i, vocabulary - i), all(largest)));
        if (vocabulary - i < 16) {
            float lane[16];
            store(lane, x);
            x = load_some(lane, vocabulary - i);
        }
        sum = add(sum, x);
    }
    *logsumexp = largest + __builtin_logf(sum_of(sum));
}

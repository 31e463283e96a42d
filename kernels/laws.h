// The parts of a law that go over a whole vocabulary. No step is fused and every sum has one order, so that a law has the same bits on every
// instruction set. Rows have room for a multiple of 16.

// to = logits / temperature, minus infinity behind them; the largest, NaN aside.
static float temper(const float* logits, int64_t count, float temperature, float* to) {
    const V by = all(temperature);
    V most = all(-__builtin_inff());
    for (int64_t i = 0; i < count; i += 16) {
        V x = div(load_some(logits + i, count - i), by);
        store(to + i, x);
        for (int64_t j = count; j < i + 16; ++j) to[j] = -__builtin_inff();
        most = larger(load(to + i), most);
    }
    return largest_of(most);
}

// The largest of every PEAKS-th number, NaN aside.
static void peaks(const float* x, int64_t count, float* most) {
    for (int64_t j = 0; j < PEAKS; j += 16) {
        V best = all(-__builtin_inff());
        for (int64_t i = j; i < count; i += PEAKS) best = larger(load(x + i), best);
        store(most + j, best);
    }
}

// The numbers that are no smaller, in order: how many, and where (room for one more).
static int64_t at_least(const float* x, int64_t count, float least, int32_t* where) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += 16) {
        if (largest_of(larger(load(x + i), all(-__builtin_inff()))) < least) continue;
        const int64_t end = count - i < 16 ? count : i + 16;
        for (int64_t j = i; j < end; ++j) {
            where[found] = int32_t(j);
            found += x[j] >= least;
        }
    }
    return found;
}

// `exponential` without fused steps.
static inline V weight(V x) {
    const V clamped = smaller(all(89.0f), larger(all(-130.0f), x));
    const V n = round_to_int(mul(clamped, all(1.44269504f)));
    const V r = add(sub(clamped, mul(n, all(0.693359375f))), mul(n, all(2.12194440e-4f)));
    V p = all(1.9875691500e-4f);
    const float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : rest) p = add(mul(p, r), all(c));
    p = add(add(mul(mul(r, r), p), r), all(1.0f));
    const V half = round_to_int(mul(n, all(0.5f)));
    return times_power_of_two(times_power_of_two(p, half), sub(n, half));
}

// x = exp(x - most), zeros behind them; their sum.
static double weigh(float* x, int64_t count, float most) {
    constexpr int64_t PART = 1024;  // fp32 sums stay short
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += PART) {
        const int64_t end = count - begin < PART ? count : begin + PART;
        V sum = zero();
        for (int64_t i = begin; i < end; i += 16) {
            const V w = first_of(weight(sub(load(x + i), all(most))), end - i);
            store(x + i, w);
            sum = add(sum, w);
        }
        total += double(sum_of(sum));
    }
    return total;
}

// to = x * factor.
static void scale(const float* x, int64_t count, float factor, float* to) {
    for (int64_t i = 0; i < count; i += 16) store_some(to + i, mul(load_some(x + i, count - i), all(factor)), count - i);
}

template <class Law, class Draft>
static void excess_of(double budget, const Law* law, const Draft* draft, int64_t count, double* to) {
    for (int64_t i = 0; i < count; ++i) {
        const double rest = budget * double(law[i]) - double(draft[i]);
        to[i] = rest > 0 ? rest : 0;
    }
}

// to = max(budget * law - draft, 0); each of the two fp32 or fp64. `to` may be the law.
static void excess(double budget, const void* law, bool wide_law, const void* draft, bool wide_draft, int64_t count, double* to) {
    if (wide_law && wide_draft) excess_of(budget, (const double*)law, (const double*)draft, count, to);
    else if (wide_law) excess_of(budget, (const double*)law, (const float*)draft, count, to);
    else if (wide_draft) excess_of(budget, (const float*)law, (const double*)draft, count, to);
    else excess_of(budget, (const float*)law, (const float*)draft, count, to);
}

// The product of tile.h on the processor's matrix unit (AMX): sixteen tokens times sixteen outputs in one instruction.
//
// An instruction sums `unit` words in an order of its own and adds them to what was there. So the unit is part of what a result is: a
// product that may come in pieces (attention's values, by blocks of keys) must be cut at units. Heights do not matter: a result depends no
// more on its neighbours than in tile.h.

struct alignas(64) UnitConfig {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Registers: 0 .. 3 sums [two heights][two vectors], 4 and 5 inputs, 6 and 7 weights.
static thread_local int32_t unit_shape = 0;  // what this thread's unit is set to; 0: nothing

static inline void set_register(UnitConfig& config, int number, int64_t rows, int64_t bytes) {
    config.rows[number] = uint8_t(rows);
    config.bytes[number] = uint16_t(rows ? bytes : 0);
}

static void shape_unit(int64_t first, int64_t second, int64_t unit) {
    const int32_t wanted = int32_t(first << 16 | second << 8 | unit);
    if (wanted == unit_shape) return;
    UnitConfig config;
    for (int v = 0; v < 2; ++v) {
        set_register(config, v, first, 64);
        set_register(config, 2 + v, second, 64);
        set_register(config, 6 + v, unit, 64);
    }
    set_register(config, 4, first, unit * 4);
    set_register(config, 5, second, unit * 4);
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic does not say that it reads all of it
    _tile_loadconfig(&config);
    unit_shape = wanted;
}

// Others on this thread (torch) shape the unit for themselves; and a thread that sleeps with a shaped one is dear to switch.
static void release_unit() {
    if (unit_shape) _tile_release();
    unit_shape = 0;
}

// Up to 32 tokens (`first` of them in the first register, the others in the second) times 16 or 32 outputs.
template <bool TALL, bool WIDE>
static __attribute__((noinline)) void unit_tile(const TileCall& call, int64_t first) {
    asm volatile("" ::: "memory");  // nor that they read memory
    const int64_t step = call.step, stride = call.stride, to = call.sums_stride * 4;
    const uint8_t *w = call.weights, *x = call.x, *lower = x + first * stride, *ahead = call.ahead;
    float *sums = call.sums, *lower_sums = sums + first * call.sums_stride;
    if (call.fresh) {
        _tile_zero(0);
        if (WIDE) _tile_zero(1);
        if (TALL) _tile_zero(2);
        if (TALL && WIDE) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, to);
        if (WIDE) _tile_loadd(1, sums + 16, to);
        if (TALL) _tile_loadd(2, lower_sums, to);
        if (TALL && WIDE) _tile_loadd(3, lower_sums + 16, to);
    }
    for (int64_t k = 0; k < call.words; k += call.unit, w += call.unit * step, x += call.unit * 4, lower += call.unit * 4) {
        _tile_loadd(4, x, stride);
        _tile_loadd(6, w, step);
        if (TALL) _tile_loadd(5, lower, stride);
        if (WIDE) _tile_loadd(7, w + 64, step);
        if (ahead)
            for (const uint8_t* end = ahead + call.unit * call.ahead_step; ahead < end; ahead += 64) __builtin_prefetch(ahead);
        _tile_dpbf16ps(0, 4, 6);
        if (WIDE) _tile_dpbf16ps(1, 4, 7);
        if (TALL) _tile_dpbf16ps(2, 5, 6);
        if (TALL && WIDE) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, to);
    if (WIDE) _tile_stored(1, sums + 16, to);
    if (TALL) _tile_stored(2, lower_sums, to);
    if (TALL && WIDE) _tile_stored(3, lower_sums + 16, to);
}

// `tokens` x `vectors` * 16 outputs of bf16.
static void unit_tiles(TileCall call, int64_t tokens, int vectors) {
    const TileCall all = call;
    for (int64_t begin = 0; begin < tokens; begin += 32) {
        const int64_t height = tokens - begin < 32 ? tokens - begin : 32, first = height < 16 ? height : 16;
        shape_unit(first, height - first, call.unit);
        call.x = all.x + begin * all.stride;
        for (int v = 0; v < vectors; v += 2) {
            call.weights = all.weights + v * 64;
            call.sums = all.sums + begin * all.sums_stride + v * 16;
            const bool tall = height > 16, wide = v + 1 < vectors;
            (tall ? wide ? unit_tile<true, true> : unit_tile<true, false>
                  : wide ? unit_tile<false, true> : unit_tile<false, false>)(call, first);
        }
    }
}

/* Integers nearest to scaled values, with parameters per group of elements along a row.
 *
 * What is right is the definition of quantdock.ops.quantize_affine: each step of the arithmetic is rounded to the dtype
 * that torch would keep it in, which is that of the values or float32.
 */
#include "kernels.h"

/* Beyond every code, and far below where ROUNDER stops to work. */
#define FAR 0x1p20f

struct parameters {
    float scale, shift, zero, lowest, highest;
};

INLINE void quantize_some(
    const void *x, enum dtype dtype, enum dtype arithmetic, bool divide, bool shifted, int64_t n, struct parameters p,
    uint8_t *restrict codes) {
    for (int64_t i = 0; i < n; i++) {
        float value = load(x, i, dtype);
        if (shifted)
            value = rounded(value + p.shift, arithmetic);
        value = rounded(divide ? value / p.scale : value * p.scale, arithmetic);
        bool is_nan = value != value;
        value = value < -FAR ? -FAR : value;
        value = value > FAR ? FAR : value;
        value = (value + ROUNDER) - ROUNDER + p.zero;
        value = value < p.lowest ? p.lowest : value;
        value = value > p.highest ? p.highest : value;
        codes[i] = (uint8_t)(int32_t)(is_nan ? 0.0f : value);
    }
}

INLINE void quantize_group(
    const void *x, enum dtype dtype, enum dtype arithmetic, bool divide, bool shifted, int64_t n, struct parameters p,
    uint8_t *codes) {
    if (dtype != FLOAT16) {
        quantize_some(x, dtype, arithmetic, divide, shifted, n, p, codes);
        return;
    }
    float values[BATCH];
    for (int64_t i = 0; i < n; i += BATCH) {
        int64_t size = n - i < BATCH ? n - i : BATCH;
        load_halves((const uint16_t *)x + i, size, values);
        quantize_some(values, FLOAT32, arithmetic, divide, shifted, size, p, codes + i);
    }
}

struct grid {
    int64_t rows, columns, stride, group;
    const void *scales, *shifts, *zeros; /* zeros are int8 or uint8, as codes are */
    enum dtype scale_dtype;
    bool is_signed;
    int32_t lowest, highest;
};

INLINE void quantize(
    const void *x, enum dtype dtype, enum dtype arithmetic, bool divide, bool shifted, const struct grid *grid,
    uint8_t *codes) {
    struct parameters p = {.lowest = (float)grid->lowest, .highest = (float)grid->highest};
    int64_t index = 0;
    for (int64_t row = 0; row < grid->rows; row++) {
        for (int64_t start = 0; start < grid->columns; start += grid->group, index++) {
            int64_t n = grid->columns - start < grid->group ? grid->columns - start : grid->group;
            p.scale = load(grid->scales, index, grid->scale_dtype);
            p.shift = shifted ? load(grid->shifts, index, grid->scale_dtype) : 0.0f;
            if (grid->zeros != NULL)
                p.zero = grid->is_signed ? ((const int8_t *)grid->zeros)[index] : ((const uint8_t *)grid->zeros)[index];
            quantize_group(
                at(x, row * grid->stride + start, dtype), dtype, arithmetic, divide, shifted, n, p,
                codes + row * grid->columns + start);
        }
    }
}

INLINE void choose(
    const void *x, enum dtype dtype, enum dtype arithmetic, bool divide, const struct grid *grid, uint8_t *codes) {
    if (grid->shifts != NULL && divide)
        quantize(x, dtype, arithmetic, true, true, grid, codes);
    else if (grid->shifts != NULL)
        quantize(x, dtype, arithmetic, false, true, grid, codes);
    else if (divide)
        quantize(x, dtype, arithmetic, true, false, grid, codes);
    else
        quantize(x, dtype, arithmetic, false, false, grid, codes);
}

KERNEL(void, quantize_affine)(
    const void *x, int dtype, int64_t rows, int64_t columns, int64_t stride, int64_t group, const void *scales,
    const void *shifts, int scale_dtype, const void *zeros, int is_signed, int divide, int lowest, int highest,
    uint8_t *codes) {
    const struct grid grid = {
        rows,   columns, stride, group, scales, shifts, zeros, (enum dtype)scale_dtype, (bool)is_signed,
        lowest, highest,
    };
    /* Two different 16-bit dtypes make float32, as they do in torch. */
    bool single = dtype != scale_dtype;
    if (dtype == FLOAT32)
        choose(x, FLOAT32, FLOAT32, divide, &grid, codes);
    else if (dtype == BFLOAT16 && single)
        choose(x, BFLOAT16, FLOAT32, divide, &grid, codes);
    else if (dtype == BFLOAT16)
        choose(x, BFLOAT16, BFLOAT16, divide, &grid, codes);
    else if (single)
        choose(x, FLOAT16, FLOAT32, divide, &grid, codes);
    else
        choose(x, FLOAT16, FLOAT16, divide, &grid, codes);
}

/* 8-bit floats with a scale per block of rows and columns.
 *
 * What is right are the definitions of quantdock.ops.encode_fp8 and decode_fp8. No step needs a subnormal float32 that
 * isn't in the data, because some set-ups flush them.
 */
#include "fp8.h"

#define LARGEST_E4M3 448.0f

/* Nearest, ties to even; too large a number becomes the largest. */
INLINE uint8_t to_e4m3(float value) {
    uint32_t sign = to_bits(value) >> 24 & 0x80;
    uint32_t bits = to_bits(value) & 0x7FFFFFFF;
    bool is_nan = bits > INFINITE_BITS;
    bits = bits > to_bits(LARGEST_E4M3) ? to_bits(LARGEST_E4M3) : bits;
    /* Below 2^-6, the smallest normal, the last bit is 2^-9: the last one of the sum, too. */
    uint32_t subnormal = to_bits(from_bits(bits) + 0x1p14f) - to_bits(0x1p14f);
    uint32_t normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120u << 3);
    uint32_t code = (bits < 121u << 23 ? subnormal : normal) | sign;
    return (uint8_t)(is_nan ? 0x7F : code);
}

INLINE void encode_some(
    const void *x, enum dtype dtype, enum dtype arithmetic, int64_t n, float scale, bool divide,
    uint8_t *restrict codes) {
    for (int64_t i = 0; i < n; i++) {
        float value = divide ? load(x, i, dtype) / scale : load(x, i, dtype) * scale;
        codes[i] = to_e4m3(rounded(value, arithmetic));
    }
}

INLINE void encode_part(
    const void *x, enum dtype dtype, enum dtype arithmetic, int64_t n, float scale, bool divide, uint8_t *codes) {
    if (dtype != FLOAT16) {
        encode_some(x, dtype, arithmetic, n, scale, divide, codes);
        return;
    }
    float values[BATCH];
    for (int64_t i = 0; i < n; i += BATCH) {
        int64_t size = n - i < BATCH ? n - i : BATCH;
        load_halves((const uint16_t *)x + i, size, values);
        encode_some(values, FLOAT32, arithmetic, size, scale, divide, codes + i);
    }
}

INLINE void encode(
    const void *x, enum dtype dtype, enum dtype arithmetic, int64_t rows, int64_t columns, int64_t stride,
    const float *scales, int64_t block_rows, int64_t block_columns, bool divide, uint8_t *codes) {
    int64_t across = (columns + block_columns - 1) / block_columns;
    for (int64_t row = 0; row < rows; row++) {
        const float *scale = scales + row / block_rows * across;
        for (int64_t start = 0; start < columns; start += block_columns, scale++) {
            int64_t n = columns - start < block_columns ? columns - start : block_columns;
            encode_part(
                at(x, row * stride + start, dtype), dtype, arithmetic, n, *scale, divide,
                codes + row * columns + start);
        }
    }
}

KERNEL(void, encode_fp8)(
    const void *x, int dtype, int64_t rows, int64_t columns, int64_t stride, const float *scales, int64_t block_rows,
    int64_t block_columns, int divide, int narrow, uint8_t *codes) {
#define ENCODE(dtype, arithmetic)                                                                                      \
    if (divide)                                                                                                        \
        encode(x, dtype, arithmetic, rows, columns, stride, scales, block_rows, block_columns, true, codes);           \
    else                                                                                                               \
        encode(x, dtype, arithmetic, rows, columns, stride, scales, block_rows, block_columns, false, codes)
    if (dtype == FLOAT32) {
        ENCODE(FLOAT32, FLOAT32);
    } else if (dtype == BFLOAT16 && narrow) {
        ENCODE(BFLOAT16, BFLOAT16);
    } else if (dtype == BFLOAT16) {
        ENCODE(BFLOAT16, FLOAT32);
    } else if (narrow) {
        ENCODE(FLOAT16, FLOAT16);
    } else {
        ENCODE(FLOAT16, FLOAT32);
    }
}

INLINE void store_some(const float *values, int64_t n, void *restrict out, int64_t i, enum dtype dtype) {
    if (dtype == FLOAT16)
        store_halves(values, n, (uint16_t *)out + i);
    else
        for (int64_t j = 0; j < n; j++)
            store(out, i + j, values[j], dtype);
}

INLINE bool has_nan(const uint8_t *codes, int64_t n) {
    uint8_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint8_t code = codes[i] & 0x7F;
        largest = code > largest ? code : largest;
    }
    return largest == E4M3_NAN;
}

INLINE void decode_part(const uint8_t *codes, enum format format, int64_t n, float scale, void *out, enum dtype dtype) {
    float values[BATCH];
    for (int64_t i = 0; i < n; i += BATCH) {
        int64_t size = n - i < BATCH ? n - i : BATCH, j = 0;
        if (size == BATCH && !(format == E4M3FN && has_nan(codes + i, BATCH)))
            for (; j < BATCH; j += SIXTEEN) {
                sixteen numbers = numbers_of(codes + i + j, format);
                sixteen scaled = (format == E4M3FN ? numbers * E4M3_UNIT : numbers) * scale;
                memcpy(values + j, &scaled, sizeof scaled);
            }
        for (; j < size; j++)
            values[j] = from_fp8(codes[i + j], format) * scale;
        store_some(values, size, out, i, dtype);
    }
}

INLINE void decode(
    const uint8_t *codes, enum format format, int64_t rows, int64_t columns, int64_t stride, const float *scales,
    int64_t block_rows, int64_t block_columns, void *out, enum dtype dtype) {
    int64_t across = (columns + block_columns - 1) / block_columns;
    for (int64_t row = 0; row < rows; row++) {
        const float *scale = scales + row / block_rows * across;
        for (int64_t start = 0; start < columns; start += block_columns, scale++) {
            int64_t n = columns - start < block_columns ? columns - start : block_columns;
            void *results = (char *)out + (row * columns + start) * (dtype == FLOAT32 ? 4 : 2);
            decode_part(codes + row * stride + start, format, n, *scale, results, dtype);
        }
    }
}

KERNEL(void, decode_fp8)(
    const uint8_t *codes, int format, int64_t rows, int64_t columns, int64_t stride, const float *scales,
    int64_t block_rows, int64_t block_columns, void *out, int dtype) {
#define DECODE(dtype)                                                                                                  \
    if (format == E4M3FN)                                                                                              \
        decode(codes, E4M3FN, rows, columns, stride, scales, block_rows, block_columns, out, dtype);                   \
    else                                                                                                               \
        decode(codes, E5M2, rows, columns, stride, scales, block_rows, block_columns, out, dtype)
    if (dtype == FLOAT32) {
        DECODE(FLOAT32);
    } else if (dtype == BFLOAT16) {
        DECODE(BFLOAT16);
    } else {
        DECODE(FLOAT16);
    }
}

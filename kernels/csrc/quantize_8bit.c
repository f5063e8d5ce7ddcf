/* 8-bit blockwise quantization: a scale per block, and a code per element read from a table over [-1, 1].
 *
 * What is right is the definition of quantdock.ops.quantize_blockwise_8bit; with the table of a bitsandbytes map it gives
 * the bits of bitsandbytes.
 */
#include "kernels.h"

#define LAST_CELL 65535.0

/* Unlike for 4 bits, NaNs don't count. */
INLINE float largest_number(const void *x, int64_t n, enum dtype dtype) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = to_bits(load(x, i, dtype)) & 0x7FFFFFFF;
        bits = bits > INFINITE_BITS ? 0 : bits;
        largest = bits > largest ? bits : largest;
    }
    return from_bits(largest);
}

INLINE int32_t cell(float value) {
    value = value < -1.0f ? -1.0f : value;
    value = value > 1.0f ? 1.0f : value;
    value = value == value ? value : -1.0f; /* a NaN belongs to the first cell */
    /* One rounding, as a fused multiplication and addition has: as doubles, the product and the sum are exact. */
    return (int32_t)(float)((double)((value + 1.0f) * 0.5f) * LAST_CELL + 0.5);
}

INLINE void quantize(
    const void *x, enum dtype dtype, int64_t count, int64_t blocksize, const uint8_t *table, uint8_t *codes,
    float *absmax) {
    int32_t cells[BATCH];
    for (int64_t start = 0; start < count; start += blocksize) {
        int64_t end = count - start < blocksize ? count : start + blocksize;
        float largest = largest_number(at(x, start, dtype), end - start, dtype);
        float factor = 1.0f / largest;
        *absmax++ = largest;
        for (int64_t i = start; i < end; i += BATCH) {
            int64_t n = end - i < BATCH ? end - i : BATCH;
            for (int64_t j = 0; j < n; j++)
                cells[j] = cell(load(x, i + j, dtype) * factor);
            for (int64_t j = 0; j < n; j++)
                codes[i + j] = table[cells[j]];
        }
    }
}

KERNEL(void, quantize_8bit)(
    const void *x, int dtype, int64_t count, int64_t blocksize, const uint8_t *table, uint8_t *codes, float *absmax) {
    if (dtype == FLOAT32)
        quantize(x, FLOAT32, count, blocksize, table, codes, absmax);
    else if (dtype == BFLOAT16)
        quantize(x, BFLOAT16, count, blocksize, table, codes, absmax);
    else
        quantize(x, FLOAT16, count, blocksize, table, codes, absmax);
}

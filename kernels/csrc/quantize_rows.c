/* 8-bit row-wise quantization of float16 values: LLM.int8, bit for bit as bitsandbytes has it.
 *
 * What is right is the definition of quantdock.ops.quantize_rows_int8.
 */
#include "kernels.h"

INLINE float load_half(const void *x, int64_t i, enum dtype dtype) {
    float value = load(x, i, dtype);
    return dtype == FLOAT16 ? value : to_nearest_half(value);
}

INLINE void quantize(
    const void *x, enum dtype dtype, int64_t rows, int64_t columns, int64_t stride, int8_t *restrict codes,
    float *restrict scales) {
    for (int64_t row = 0; row < rows; row++) {
        const void *values = at(x, row * stride, dtype);
        int8_t *out = codes + row * columns;
        /* Rounding keeps the order, so the largest of the rounded is the largest, rounded. */
        float scale = largest_magnitude(values, columns, dtype);
        scale = dtype == FLOAT16 ? scale : to_nearest_half(scale);
        scales[row] = scale;
        float factor = (1.0f / scale) * 127.0f;
        for (int64_t i = 0; i < columns; i++) {
            float scaled = load_half(values, i, dtype) * factor;
            int8_t code = (int8_t)(uint8_t)(to_bits(scaled + ROUNDER) & 0xFF);
            out[i] = scaled == scaled ? code : 0;
        }
    }
}

KERNEL(void, quantize_rows_int8)(
    const void *x, int dtype, int64_t rows, int64_t columns, int64_t stride, int8_t *codes, float *scales) {
    if (dtype == FLOAT32)
        quantize(x, FLOAT32, rows, columns, stride, codes, scales);
    else if (dtype == BFLOAT16)
        quantize(x, BFLOAT16, rows, columns, stride, codes, scales);
    else
        quantize(x, FLOAT16, rows, columns, stride, codes, scales);
}

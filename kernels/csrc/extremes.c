/* The smallest and the largest element, or the largest magnitude, of each group of elements along a row.
 *
 * What is right are the definitions of quantdock.ops.group_extremes and group_magnitudes. As integers, floats of the same
 * sign are in order; turning the bits of negative ones around makes it one order for all, with NaNs at both ends.
 */
#include "kernels.h"

#define DEFINE_EXTREMES(name, bits_type, key_type, shift, infinite, quiet)                                             \
    INLINE key_type name##_key(bits_type bits) {                                                                       \
        key_type key = (key_type)bits;                                                                                 \
        return (key_type)(key ^ ((key >> shift) & (key_type)(((bits_type)-1) >> 1)));                                  \
    }                                                                                                                  \
    INLINE bits_type name##_value(key_type key, bool is_nan) {                                                         \
        key = key == -1 ? 0 : key; /* -0.0 */                                                                          \
        return is_nan ? (bits_type)(quiet) : (bits_type)name##_key((bits_type)key);                                    \
    }                                                                                                                  \
    INLINE void name(const void *values, int64_t n, void *smallest, void *largest, int64_t group) {                    \
        const bits_type *x = values;                                                                                   \
        key_type low = name##_key(x[0]), high = low;                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            key_type key = name##_key(x[i]);                                                                           \
            low = key < low ? key : low;                                                                               \
            high = key > high ? key : high;                                                                            \
        }                                                                                                              \
        bool is_nan = high > (infinite) || low < ~(infinite);                                                          \
        ((bits_type *)smallest)[group] = name##_value(low, is_nan);                                                    \
        ((bits_type *)largest)[group] = name##_value(high, is_nan);                                                    \
    }

DEFINE_EXTREMES(extremes_32, uint32_t, int32_t, 31, 0x7F800000, 0x7FC00000)
DEFINE_EXTREMES(extremes_bfloat16, uint16_t, int16_t, 15, 0x7F80, 0x7FC0)
DEFINE_EXTREMES(extremes_float16, uint16_t, int16_t, 15, 0x7C00, 0x7E00)

INLINE void group_extremes_of(
    const void *x, enum dtype dtype, int64_t rows, int64_t columns, int64_t stride, int64_t group, void *smallest,
    void *largest) {
    int64_t index = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < columns; start += group, index++) {
            const void *values = at(x, row * stride + start, dtype);
            int64_t n = columns - start < group ? columns - start : group;
            if (dtype == FLOAT32)
                extremes_32(values, n, smallest, largest, index);
            else if (dtype == BFLOAT16)
                extremes_bfloat16(values, n, smallest, largest, index);
            else
                extremes_float16(values, n, smallest, largest, index);
        }
    }
}

KERNEL(void, group_extremes)(
    const void *x, int dtype, int64_t rows, int64_t columns, int64_t stride, int64_t group, void *smallest,
    void *largest) {
    if (dtype == FLOAT32)
        group_extremes_of(x, FLOAT32, rows, columns, stride, group, smallest, largest);
    else if (dtype == BFLOAT16)
        group_extremes_of(x, BFLOAT16, rows, columns, stride, group, smallest, largest);
    else
        group_extremes_of(x, FLOAT16, rows, columns, stride, group, smallest, largest);
}

INLINE void group_magnitudes_of(
    const void *x, enum dtype dtype, int64_t rows, int64_t columns, int64_t stride, int64_t group, void *magnitudes) {
    int64_t index = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < columns; start += group, index++) {
            int64_t n = columns - start < group ? columns - start : group;
            uint32_t bits = largest_bits(at(x, row * stride + start, dtype), n, dtype);
            if (dtype == FLOAT32)
                ((uint32_t *)magnitudes)[index] = bits;
            else
                ((uint16_t *)magnitudes)[index] = (uint16_t)bits;
        }
    }
}

KERNEL(void, group_magnitudes)(
    const void *x, int dtype, int64_t rows, int64_t columns, int64_t stride, int64_t group, void *magnitudes) {
    if (dtype == FLOAT32)
        group_magnitudes_of(x, FLOAT32, rows, columns, stride, group, magnitudes);
    else if (dtype == BFLOAT16)
        group_magnitudes_of(x, BFLOAT16, rows, columns, stride, group, magnitudes);
    else
        group_magnitudes_of(x, FLOAT16, rows, columns, stride, group, magnitudes);
}

/* One 16-bit float dtype to the other: to nearest, ties to even. A NaN stays a NaN; nobody says which.
 *
 * What is right is the definition of quantdock.ops.cast, which is torch's conversion. From and to float32, torch is as fast
 * as memory; between these two it isn't.
 */
#include "kernels.h"

KERNEL(void, cast)(const uint16_t *x, int dtype, int64_t count, uint16_t *restrict out) {
    float values[BATCH];
    for (int64_t i = 0; i < count; i += BATCH) {
        int64_t n = count - i < BATCH ? count - i : BATCH;
        if (dtype == FLOAT16) {
            load_halves(x + i, n, values);
            for (int64_t j = 0; j < n; j++)
                out[i + j] = to_bfloat16(values[j]);
        } else {
            for (int64_t j = 0; j < n; j++)
                values[j] = load(x, i + j, BFLOAT16);
            store_halves(values, n, out + i);
        }
    }
}

/* Integer codes, a byte each, to the blocks of words that multiply_words.c reads, and back. */
#include "blocks.h"
#include "threads.h"

/* Where things are: codes are [inputs, outputs], and words begin with the block of the first output. */
struct packing {
    uint8_t *codes;
    uint32_t *words;
    int64_t inputs, outputs;
};

/* The constants `bits` and, for all blocks but the last, `width` make loops of vectors. */
INLINE void pack_block(const struct packing *p, int64_t first, int64_t width, int bits) {
    uint32_t *words = p->words + first * p->inputs * bits / 32;
    for (int64_t k = 0; k < p->inputs; k += 32 / bits, words += width) {
        uint32_t own[BLOCK] = {0};
        for (int i = 0; i < 32 / bits; i++) {
            const uint8_t *codes = p->codes + (k + i) * p->outputs + first;
            for (int64_t n = 0; n < width; n++)
                own[n] |= (uint32_t)codes[n] << SHIFT_OF(i, bits);
        }
        memcpy(words, own, (size_t)(4 * width));
    }
}

INLINE void unpack_block(const struct packing *p, int64_t first, int64_t width, int bits) {
    const uint32_t *words = p->words + first * p->inputs * bits / 32;
    for (int64_t k = 0; k < p->inputs; k += 32 / bits, words += width)
        for (int i = 0; i < 32 / bits; i++) {
            uint8_t *codes = p->codes + (k + i) * p->outputs + first;
            for (int64_t n = 0; n < width; n++)
                codes[n] = (uint8_t)(words[n] >> SHIFT_OF(i, bits) & ((1u << bits) - 1));
        }
}

INLINE void take(const struct packing *p, int bits, bool unpack) {
    for (int64_t first = 0; first < p->outputs; first += BLOCK) {
        int64_t width = least(BLOCK, p->outputs - first);
        if (unpack)
            width == BLOCK ? unpack_block(p, first, BLOCK, bits) : unpack_block(p, first, width, bits);
        else
            width == BLOCK ? pack_block(p, first, BLOCK, bits) : pack_block(p, first, width, bits);
    }
}

INLINE void convert(struct packing p, int bits, bool unpack) {
    if (bits == 2)
        take(&p, 2, unpack);
    else if (bits == 4)
        take(&p, 4, unpack);
    else
        take(&p, 8, unpack);
}

KERNEL(void, pack_blocks)(const uint8_t *codes, int64_t inputs, int64_t outputs, int bits, uint32_t *words) {
    convert((struct packing){(uint8_t *)codes, words, inputs, outputs}, bits, false);
}

KERNEL(void, unpack_blocks)(const uint32_t *words, int64_t inputs, int64_t outputs, int bits, uint8_t *codes) {
    convert((struct packing){codes, (uint32_t *)words, inputs, outputs}, bits, true);
}

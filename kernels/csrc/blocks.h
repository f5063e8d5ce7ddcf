/* Blocks of words: where the words of a matrix of integer codes are. */
#ifndef QUANTDOCK_BLOCKS_H
#define QUANTDOCK_BLOCKS_H

#define BLOCK 64 /* outputs whose words lie together; products.py has it, too */

/* From the lowest bit of a word to its code number `i`. Byte n has the codes n, n + 4, and so on, from its lowest bits on. */
#define SHIFT_OF(i, bits) ((i) % 4 * 8 + (i) / 4 * (bits))

#endif

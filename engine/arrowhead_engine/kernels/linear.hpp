// SPDX-License-Identifier: Apache-2.0
// A linear layer, y = x Wᵀ + b: its weights laid out in panels, and x in the format they want.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "rows.hpp"

// As native.py numbers them. FLOAT16 is of the weights only, x stays float32.
enum Format { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// From so many rows on, widening a panel of float16 once is cheaper than doing so in every tile.
constexpr int MANY_ROWS = 48;

static inline float number(const void* p, int format, size_t i) {
    if (format == FLOAT32) return ((const float*)p)[i];
    if (format == FLOAT16) return _cvtsh_ss(((const uint16_t*)p)[i]);
    if (format == INT8) return ((const int8_t*)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t bfloat16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Memory of the system's own, zeroed, on a page of its own; null when there is none.
static inline void* pages(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

struct Linear {
    Format format;
    int in, out, lanes, groups;
    size_t panel_bytes, bytes;
    char* panels;       // the caller's, [bytes]
    float* scales;      // INT8: [panels, groups, 2, 32] after the panels, see Int8Product
    const float* bias;  // the caller's, [out]
};

// The largest group of inputs that share a scale: small ones are exact, large ones fast. At 128
// MiniLM's worst cosine is 0.997; with one scale for a whole row it is 0.991.
static inline int group_of(int in) {
    return in % 128 == 0 ? 128 : in % 96 == 0 ? 96 : in % 64 == 0 ? 64 : 32;
}

// A layer over `panels`, which are laid out or still to be; without them it tells what they take.
static inline Linear layer_over(char* panels, int format, int in, int out, const float* bias) {
    constexpr int NUMBERS[] = {1, 1, 2, 4}, BYTES[] = {4, 2, 4, 4};  // in a lane
    int lanes = in / NUMBERS[format], groups = format == INT8 ? in / group_of(in) : 1;
    size_t panel_bytes = (size_t)lanes * PANEL * BYTES[format], all = out / PANEL * panel_bytes;
    size_t scales = format == INT8 ? (size_t)out * groups * 2 * sizeof(float) : 0;
    return {(Format)format, in, out, lanes, groups, panel_bytes, all + scales,
            panels, panels ? (float*)(panels + all) : nullptr, bias};
}

// Weights [out, in], stored in rows, into the panels; those of int8 are multiplied with `row_scales` [out].
// Every byte is written, so what was there before does not matter. False without memory.
static inline bool lay_out(const Linear& l, const void* weights, int stored, const float* row_scales) {
    int numbers = l.in / l.lanes, group = l.in / l.groups;
    if (l.format == FLOAT16 && stored == FLOAT16) {  // nothing to convert, only to turn
        for (int p = 0; p < l.out / PANEL; p++) {
            const uint16_t* from = (const uint16_t*)weights + (size_t)p * PANEL * l.in;
            uint16_t* to = (uint16_t*)(l.panels + p * l.panel_bytes);
            for (int k = 0; k < l.in; k++)
                for (int n = 0; n < PANEL; n++) to[k * PANEL + n] = from[(size_t)n * l.in + k];
        }
        return true;
    }
    float* row = (float*)malloc(sizeof(float) * l.in);
    if (!row) return false;
    for (int n = 0; n < l.out; n++) {
        char* panel = l.panels + n / PANEL * l.panel_bytes;
        for (int k = 0; k < l.in; k++) {
            row[k] = number(weights, stored, (size_t)n * l.in + k);
            if (row_scales) row[k] *= row_scales[n];
        }
        for (int g = 0; g < l.groups; g++) {
            float largest = 0, inverse = 0;
            int sum = 0;
            for (int k = g * group; k < (g + 1) * group; k++)
                if (__builtin_fabsf(row[k]) > largest) largest = __builtin_fabsf(row[k]);
            if (largest > 1e-30f) inverse = 127 / largest;  // less comes to nothing
            for (int k = g * group; k < (g + 1) * group; k++) {
                size_t lane = (size_t)(k / numbers) * PANEL + n % PANEL;
                if (l.format == FLOAT32) ((float*)panel)[lane] = row[k];
                else if (l.format == FLOAT16) ((uint16_t*)panel)[lane] = _cvtss_sh(row[k], _MM_FROUND_TO_NEAREST_INT);
                else if (l.format == BFLOAT16) ((uint16_t*)panel)[2 * lane + k % 2] = bfloat16(row[k]);
                else {
                    int q = (int)__builtin_rintf(row[k] * inverse);
                    ((int8_t*)panel)[4 * lane + k % 4] = (int8_t)q;
                    sum += q;
                }
            }
            if (l.format == INT8) {
                float* scale = l.scales + ((size_t)(n / PANEL) * l.groups + g) * 2 * PANEL + n % PANEL;
                scale[0] = largest / 127, scale[PANEL] = largest / 127 * sum;
            }
        }
    }
    free(row);
    return true;
}

// x in the narrow format of the next product, whose `in` and `groups` say how far its rows lie apart.
struct Narrow {
    char* numbers;  // [rows, in] of uint8 or bfloat16
    float* scales;  // of uint8: [rows, groups, 2], see Int8Product
};

static inline bool is_narrow(const Linear& l) { return l.format == BFLOAT16 || l.format == INT8; }

static inline void narrow(const Linear& l, const float* x, int r, const Narrow& to) {
    x += (size_t)r * l.in;
    if (l.format == BFLOAT16) to_bfloat16(x, l.in, (uint16_t*)to.numbers + (size_t)r * l.in);
    if (l.format == INT8) {
        int group = l.in / l.groups;
        uint8_t* q = (uint8_t*)to.numbers + (size_t)r * l.in;
        float* scales = to.scales + (size_t)r * l.groups * 2;
        for (int g = 0; g < l.groups; g++, x += group, q += group, scales += 2)
            switch (group) {
                case 128: quantize<8>(x, q, scales); break;
                case 96: quantize<6>(x, q, scales); break;
                case 64: quantize<4>(x, q, scales); break;
                default: quantize<2>(x, q, scales);
            }
    }
}

enum How { STORE, ADD, GELU, ROUGH_GELU };

// Columns [32 p, 32 p + 32) of y = x Wᵀ + b for all rows. What `l` takes narrow was made so before.
template <How how>
static inline void multiply(const Linear& l, int p, const float* x, const Narrow& small, int rows, float* y,
                            float* scratch) {
    const char* panel = l.panels + p * l.panel_bytes;
    const float* bias = l.bias + p * PANEL;
    y += p * PANEL;
    auto done = [&](int row, int column, f32 sum) {
        float* to = y + (size_t)row * l.out + column;
        sum = _mm512_add_ps(sum, load(bias + column));
        store(to, how == ADD ? _mm512_add_ps(sum, load(to))
                  : how == GELU ? gelu(sum)
                  : how == ROUGH_GELU ? rough_gelu(sum) : sum);
    };
    size_t stride = l.lanes;
    if (l.format == FLOAT16 && rows < MANY_ROWS) {
        by_tiles(Product<Float16>{x, stride, panel, l.lanes}, rows, done);
    } else if (l.format == FLOAT32 || l.format == FLOAT16) {
        if (l.format == FLOAT16) {
            for (int i = 0; i < l.lanes * PANEL; i += 16) store(scratch + i, widened((const uint16_t*)panel + i));
            panel = (const char*)scratch;
        }
        by_tiles(Product<Float32>{x, stride, panel, l.lanes}, rows, done);
    } else if (l.format == BFLOAT16) {
        by_tiles(Product<Bfloat16>{(const int32_t*)small.numbers, stride, panel, l.lanes}, rows, done);
    } else {
        const float* scales = l.scales + (size_t)p * l.groups * 2 * PANEL;
        by_tiles(Int8Product{(const int32_t*)small.numbers, stride, panel, l.lanes, l.groups, small.scales, scales},
                 rows, done);
    }
}

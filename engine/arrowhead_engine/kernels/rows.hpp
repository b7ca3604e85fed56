// SPDX-License-Identifier: Apache-2.0
// What is done to a single row: norm, number formats, GELU, softmax. All of it in float32.
#pragma once
#include "tile.hpp"

static INLINE __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

// e^x for x <= 0, to 1.3e-6 of its value (2e-7 from -8 on): 2^n times a polynomial for 2^r, |r| <= 1/2
// (Chebyshev, degree 6).
static INLINE f32 exponential(f32 x) {
    // Far below, n is no longer exact, r grows and the polynomial overflows, while e^x has long been 0.
    // In this order a NaN stays one.
    x = _mm512_max_ps(set(-120.0f), x);
    f32 n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32 r = _mm512_fmsub_ps(x, set(1.44269504f), n);
    f32 p = set(0.000154614447f);
    p = _mm512_fmadd_ps(p, r, set(0.00134004282f));
    p = _mm512_fmadd_ps(p, r, set(0.00961805668f));
    p = _mm512_fmadd_ps(p, r, set(0.0555032723f));
    p = _mm512_fmadd_ps(p, r, set(0.240226509f));
    p = _mm512_fmadd_ps(p, r, set(0.693147207f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    return _mm512_scalef_ps(p, n);
}

// BERT's exact GELU, x Phi(x), to 4e-7 |x|; the tail of Phi by Abramowitz and Stegun 7.1.26.
static INLINE f32 gelu(f32 x) {
    f32 size = _mm512_abs_ps(x);
    f32 d = _mm512_fmadd_ps(size, set(0.3275911f * 0.70710678f), set(1.0f));
    f32 u = _mm512_rcp14_ps(d);
    u = _mm512_mul_ps(u, _mm512_fnmadd_ps(d, u, set(2.0f)));  // Newton: 1 / d to full width
    f32 p = set(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, u, set(0.5f * -1.453152027f));
    p = _mm512_fmadd_ps(p, u, set(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, u, set(0.5f * -0.284496736f));
    p = _mm512_fmadd_ps(p, u, set(0.5f * 0.254829592f));
    f32 bell = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), set(-0.5f)));
    f32 tail = _mm512_mul_ps(_mm512_mul_ps(p, u), bell);
    return _mm512_fnmadd_ps(size, tail, _mm512_max_ps(x, _mm512_setzero_ps()));
}

// The same to 1.4e-4: what becomes of it in int8 is off by more. The tail, times |x|, to 4e-5.
static INLINE f32 rough_gelu(f32 x) {
    f32 size = _mm512_min_ps(set(4.0f), _mm512_abs_ps(x));  // in this order a NaN stays one
    f32 p = set(5.11856536e-05f);
    p = _mm512_fmadd_ps(p, size, set(-0.000849333774f));
    p = _mm512_fmadd_ps(p, size, set(0.00509909821f));
    p = _mm512_fmadd_ps(p, size, set(-0.0102998157f));
    p = _mm512_fmadd_ps(p, size, set(-0.0184310484f));
    p = _mm512_fmadd_ps(p, size, set(0.10038091f));
    p = _mm512_fmadd_ps(p, size, set(-0.0264787783f));
    p = _mm512_fmadd_ps(p, size, set(-0.389800634f));
    p = _mm512_fmadd_ps(p, size, set(0.498960572f));
    return _mm512_fnmadd_ps(size, p, _mm512_max_ps(x, _mm512_setzero_ps()));
}

// Layer norm of a row, in place.
static inline void normalize(float* x, int width, const float* weight, const float* bias, float eps) {
    f32 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, load(x + i));
    f32 mean = set(_mm512_reduce_add_ps(sum) / width);
    for (int i = 0; i < width; i += 16) {
        f32 d = _mm512_sub_ps(load(x + i), mean);
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    f32 scale = set(1 / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
    for (int i = 0; i < width; i += 16) {
        f32 y = _mm512_mul_ps(_mm512_sub_ps(load(x + i), mean), scale);
        store(x + i, _mm512_fmadd_ps(y, load(weight + i), load(bias + i)));
    }
}

// 16 REGISTERS numbers as uint8: x = scale (q - zero), both ends of their range met. scales: scale, scale
// zero.
template <int REGISTERS>
static inline void quantize(const float* x, uint8_t* q, float* scales) {
    f32 numbers[REGISTERS], low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
#pragma unroll
    for (int i = 0; i < REGISTERS; i++) {
        numbers[i] = load(x + 16 * i);
        low = _mm512_min_ps(low, numbers[i]);
        high = _mm512_max_ps(high, numbers[i]);
    }
    float least = _mm512_reduce_min_ps(low), range = _mm512_reduce_max_ps(high) - least;
    if (range < 1e-30f) range = 1e-30f;  // but a NaN goes into the scales, and so into what comes of them
    float inverse = 255 / range;
    int32_t zero = (int32_t)(-least * inverse + 0.5f);
    scales[0] = range / 255, scales[1] = scales[0] * zero;
#pragma unroll
    for (int i = 0; i < REGISTERS; i++) {
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(numbers[i], set(inverse)));
        n = _mm512_max_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(zero)), _mm512_setzero_si512());
        _mm_storeu_si128((__m128i*)(q + 16 * i), _mm512_cvtusepi32_epi8(n));
    }
}

static inline void to_bfloat16(const float* x, int count, uint16_t* y) {
    for (int i = 0; i < count; i += 16)
        _mm256_storeu_si256((__m256i*)(y + i), (__m256i)_mm512_cvtneps_pbh(load(x + i)));
}

// A row of scores, in place -> e^(scale score + bias - the largest), and their sum. What fills up the
// last register becomes 0. `bias` may be null.
static inline float softmax(float* x, int length, float scale, const float* bias) {
    f32 high = set(-__builtin_inff());
    for (int i = 0; i < length; i += 16) {
        __mmask16 real = first_lanes(length - i);
        f32 y = _mm512_mul_ps(load(x + i), set(scale));
        if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(real, bias + i));
        store(x + i, y);
        high = _mm512_mask_max_ps(high, real, high, y);
    }
    f32 top = set(_mm512_reduce_max_ps(high)), sum = _mm512_setzero_ps();
    for (int i = 0; i < length; i += 16) {
        f32 y = exponential(_mm512_sub_ps(load(x + i), top));
        y = _mm512_maskz_mov_ps(first_lanes(length - i), y);
        store(x + i, y);
        sum = _mm512_add_ps(sum, y);
    }
    return _mm512_reduce_add_ps(sum);
}

// 2^x to 7.5e-5 of its value.
static INLINE f32 rough_power(f32 x) {
    f32 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32 r = _mm512_sub_ps(x, n);
    f32 p = _mm512_fmadd_ps(set(0.0551714899f), r, set(0.242610935f));
    p = _mm512_fmadd_ps(p, r, set(0.69326099f));
    p = _mm512_fmadd_ps(p, r, set(0.999928082f));
    return _mm512_scalef_ps(p, n);
}

// The softmax of scores that are whole numbers, in place -> as int16, the largest 4096, and their sum.
// What fills up the last register becomes 0. `bias` may be null.
static inline float softmax_int16(int32_t* x, int length, float scale, const float* bias) {
    const float log2e = 1.44269504f;
    f32 high = set(-__builtin_inff());
    auto scored = [&](int i, __mmask16 real) {
        f32 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(x + i)), set(scale * log2e));
        if (bias) y = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(real, bias + i), set(log2e), y);
        store((float*)x + i, y);
        high = _mm512_mask_max_ps(high, real, high, y);
    };
    const int full = length / 16 * 16;
    for (int i = 0; i < full; i += 16) scored(i, 0xffff);
    if (full < length) scored(full, first_lanes(length - full));
    f32 top = set(_mm512_reduce_max_ps(high) - 12);
    __m512i sum = _mm512_setzero_si512();
    auto weighed = [&](int i, __mmask16 real) {
        f32 y = rough_power(_mm512_sub_ps(load((float*)x + i), top));
        __m512i n = _mm512_maskz_cvtps_epi32(real, y);
        _mm256_storeu_si256((__m256i*)((int16_t*)x + i), _mm512_cvtepi32_epi16(n));
        sum = _mm512_add_epi32(sum, n);
    };
    for (int i = 0; i < full; i += 16) weighed(i, 0xffff);
    if (full < length) weighed(full, first_lanes(length - full));
    return (float)_mm512_reduce_add_epi32(sum);
}

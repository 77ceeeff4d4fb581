#pragma once

// Half precision, in loops that the compiler turns into vector code.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace coreinfer {

// Half to single precision for finite values: put the bits in place and rescale the exponent.
static inline float from_half(uint16_t h) {
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    float          value;
    std::memcpy(&value, &magnitude, sizeof(value));
    value *= 0x1p112f;
    return (h & 0x8000) ? -value : value;
}

// Single to half precision, to the nearest and on a tie to the even, for values that are not NaN.
static inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign      = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    // a carry out of the mantissa is the next exponent, as it should be
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // below 2^-14 halves are multiples of 2^-24, as are floats in 0.5 .. 1
    const float shifted = std::fabs(value) + 0.5f;
    uint32_t    subnormal;
    std::memcpy(&subnormal, &shifted, sizeof(subnormal));
    subnormal -= 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude < 0x47800000 ? finite : 0x7c00));
}

} // namespace coreinfer

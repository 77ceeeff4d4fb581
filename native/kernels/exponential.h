#pragma once

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

// The exponential of x less n times the logarithm of 2, n being the nearest integer: to within 2e-7 of itself.
template <class V>
inline typename V::Float exponential_of_rest(typename V::Float x, typename V::Float n) {
    auto r = V::fma(n, V::splat(-0x1.62e4p-1f), x);
    r      = V::fma(n, V::splat(-0x1.7f7d1cp-20f), r);
    auto y = V::splat(1.0f / 720);
    for (const float c : { 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f }) {
        y = V::fma(y, r, V::splat(c));
    }
    return y;
}

} // namespace
} // namespace coreinfer

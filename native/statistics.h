#pragma once

// What is added up over the tokens of a prompt: sums of the activation, the input of ffn_down.

#include <cstdint>

namespace coreinfer {

// What the activation of one token is held against.
struct TokenMeasure {
    float inverse_square; // 1 / squared Euclidean norm of the activation, 0 if that is 0
    float top;            // the least of its largest positive values
};

// act [n]. top_share: how many of the positive values count as the largest, rounded up; 0 if that is not
// wanted. scratch is memory to work in, kept from call to call.
TokenMeasure measure_token(const float * act, int64_t n, float top_share);

// Sums over tokens, one for each neuron.
struct Sums {
    float * sum;           // of the activation
    float * sum_sq;        // of its square
    float * normalized_sq; // of its square in the token's activation of norm 1; nullptr if not wanted
    float * top;           // how often it was among the largest positive; nullptr if not wanted
    float * active;        // how often it was not zero; nullptr if not wanted

    Sums from(int64_t neuron) const;
};

// Add n_rows tokens of n neurons, stride floats apart in x. measures [n_rows] may be nullptr where neither
// normalized_sq nor top is wanted.
void add_tokens(const float * x, int64_t stride, int64_t n_rows, const TokenMeasure * measures, const Sums & sums,
                int64_t n);

} // namespace coreinfer

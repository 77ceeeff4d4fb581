#pragma once

// Small models with random weights, and the pieces to run them.

#include "coreinfer.h"
#include "ggml-cpp.h"
#include "llama-cpp.h"

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace test {

// A path of its own in the temporary folder, removed at the end.
class TempFile {
  public:
    TempFile();
    ~TempFile();
    TempFile(const TempFile &)             = delete;
    TempFile & operator=(const TempFile &) = delete;

    const char * path() const { return path_.c_str(); }

    // Leave only this many bytes, or a part of what there is.
    void cut(uint64_t size) const;
    void cut_to(double part) const;

  private:
    std::string path_;
};

class Random {
  public:
    explicit Random(uint32_t seed) : engine_(seed) {}

    // Normally distributed values.
    std::vector<float> floats(int64_t n, float scale);

    std::vector<uint8_t> bytes(int64_t n);

    int32_t below(int32_t n);

    // n of the numbers below n_ff, ascending.
    std::vector<int32_t> neurons(int32_t n, int32_t n_ff);

    // n weights of any type, n a multiple of its block size: blocks drawn from a stock of quantised ones.
    std::vector<uint8_t> weights(ggml_type type, int64_t n);

  private:
    std::mt19937                              engine_;
    std::map<ggml_type, std::vector<uint8_t>> stock_;
};

// Has a tensor, and to_float: can be the type of weights.
const std::vector<ggml_type> & weight_types();

// A tensor of a file to be written.
struct NamedTensor {
    std::string          name;
    ggml_type            type;
    std::vector<int64_t> ne;
    std::vector<uint8_t> data;
};

std::vector<uint8_t> as_bytes(const std::vector<float> & values);

void write_gguf(const char * path, gguf_context * keys, const std::vector<NamedTensor> & tensors);

// A model of the llama architecture with one layer for each type, which its FFN weights are of.
struct Shape {
    int64_t                n_embd   = 68;
    int64_t                n_ff     = 100;
    int64_t                n_head   = 2;
    int64_t                n_vocab  = 50;
    int64_t                n_expert = 0;
    bool                   biases   = true;
    std::vector<ggml_type> layers   = { GGML_TYPE_F32, GGML_TYPE_F32, GGML_TYPE_F32 };
};

void write_model(const char * path, const Shape & shape, uint32_t seed);

llama_model_ptr load_model(const char * path, bool use_mmap = true);

// The same with the weights of the FFNs and the embedding left in the file.
llama_model_ptr load_streamed(const char * path, const char * pattern = "(ffn_(up|gate|down)|token_embd)\\.weight");

llama_context_ptr make_context(llama_model * model, ggml_backend_sched_eval_callback callback = nullptr,
                               void * data = nullptr, int32_t n_threads = 1);

// Evaluate the tokens after those before; the logits of the last.
std::vector<float> decode(llama_context * ctx, std::vector<llama_token> tokens);

struct CoreinferDeleter {
    void operator()(coreinfer_context * ctx) { coreinfer_free(ctx); }
};

using coreinfer_ptr = std::unique_ptr<coreinfer_context, CoreinferDeleter>;

// Fails the test if it cannot be made.
coreinfer_ptr attach(llama_context * llama, const char * path, int32_t n_threads = 2, bool packed = false);

} // namespace test

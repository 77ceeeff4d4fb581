#include "model.h"

#include "check.h"
#include "gguf.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <numeric>

namespace test {

TempFile::TempFile() {
    static std::atomic<int> count(0);
    const std::string       name =
        "coreinfer-test-" + std::to_string(std::random_device()()) + "-" + std::to_string(count++) + ".gguf";
    path_ = (std::filesystem::temp_directory_path() / name).string();
}

TempFile::~TempFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
}

void TempFile::cut(uint64_t size) const {
    std::filesystem::resize_file(path_, size);
}

void TempFile::cut_to(double part) const {
    cut(static_cast<uint64_t>(static_cast<double>(std::filesystem::file_size(path_)) * part));
}

std::vector<float> Random::floats(int64_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              values(n);
    std::generate(values.begin(), values.end(), [&] { return normal(engine_); });
    return values;
}

std::vector<uint8_t> Random::bytes(int64_t n) {
    std::vector<uint8_t> values(n);
    std::generate(values.begin(), values.end(), [&] { return static_cast<uint8_t>(engine_()); });
    return values;
}

int32_t Random::below(int32_t n) {
    return std::uniform_int_distribution<int32_t>(0, n - 1)(engine_);
}

std::vector<int32_t> Random::neurons(int32_t n, int32_t n_ff) {
    std::vector<int32_t> all(n_ff);
    std::iota(all.begin(), all.end(), 0);
    std::vector<int32_t> chosen;
    std::sample(all.begin(), all.end(), std::back_inserter(chosen), n, engine_);
    return chosen;
}

// The upper byte of the scale of a block: where it is, and a value that makes weights of common size. For
// types that ggml takes seconds to prepare quantising to and where any other bytes are good, so that blocks
// of random bytes do as well. At -1: not such a type.
struct ScaleByte {
    int     at;
    uint8_t value;
};

static ScaleByte scale_byte(ggml_type type) {
    switch (type) {
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
            return { 1, 0x18 };
        case GGML_TYPE_IQ1_S:
            return { 1, 0x24 };
        case GGML_TYPE_IQ1_M:
            return { 55, 0x20 };
        default:
            return { -1, 0 };
    }
}

std::vector<uint8_t> Random::weights(ggml_type type, int64_t n) {
    constexpr int64_t      kRow   = 256; // a multiple of every block size
    constexpr int64_t      kRows  = 16;
    const size_t           size   = ggml_type_size(type);
    std::vector<uint8_t> & blocks = stock_[type];
    const ScaleByte        scale  = scale_byte(type);
    if (blocks.empty() && scale.at >= 0) {
        blocks = bytes(kRows * ggml_row_size(type, kRow));
        for (size_t at = scale.at; at < blocks.size(); at += size) {
            blocks[at] = scale.value;
        }
    } else if (blocks.empty()) {
        const std::vector<float> values = floats(kRow * kRows, 0.1f);
        const std::vector<float> importance(kRow, 1.0f);
        blocks.resize(kRows * ggml_row_size(type, kRow));
        ggml_quantize_chunk(type, values.data(), blocks.data(), 0, kRows, kRow, importance.data());
    }
    const int32_t        n_stock = static_cast<int32_t>(blocks.size() / size);
    std::vector<uint8_t> result(ggml_row_size(type, n));
    for (size_t at = 0; at < result.size(); at += size) {
        std::memcpy(result.data() + at, blocks.data() + below(n_stock) * size, size);
    }
    return result;
}

const std::vector<ggml_type> & weight_types() {
    static const std::vector<ggml_type> types = [] {
        std::vector<ggml_type> list;
        for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
            const auto type = static_cast<ggml_type>(i);
            if (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float) {
                list.push_back(type);
            }
        }
        return list;
    }();
    return types;
}

std::vector<uint8_t> as_bytes(const std::vector<float> & values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(float));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

void write_gguf(const char * path, gguf_context * keys, const std::vector<NamedTensor> & tensors) {
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * tensors.size(), nullptr, /*.no_alloc =*/true }));
    for (const NamedTensor & tensor : tensors) {
        ggml_tensor * made =
            ggml_new_tensor(ctx.get(), tensor.type, static_cast<int>(tensor.ne.size()), tensor.ne.data());
        CHECK(ggml_nbytes(made) == tensor.data.size(), tensor.name);
        ggml_set_name(made, tensor.name.c_str());
        gguf_add_tensor(keys, made);
        gguf_set_tensor_data(keys, tensor.name.c_str(), tensor.data.data());
    }
    CHECK(gguf_write_to_file(keys, path, /*only_meta =*/false), path);
}

void write_model(const char * path, const Shape & shape, uint32_t seed) {
    gguf_context_ptr keys(gguf_init_empty());
    const auto       set = [&](const char * name, int64_t value) {
        gguf_set_val_u32(keys.get(), (std::string("llama.") + name).c_str(), static_cast<uint32_t>(value));
    };
    gguf_set_val_str(keys.get(), "general.architecture", "llama");
    gguf_set_val_str(keys.get(), "tokenizer.ggml.model", "none");
    set("vocab_size", shape.n_vocab);
    set("context_length", 512);
    set("embedding_length", shape.n_embd);
    set("feed_forward_length", shape.n_ff);
    set("block_count", static_cast<int64_t>(shape.layers.size()));
    set("attention.head_count", shape.n_head);
    set("attention.head_count_kv", shape.n_head);
    gguf_set_val_f32(keys.get(), "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (shape.n_expert) {
        set("expert_count", shape.n_expert);
        set("expert_used_count", 1);
    }

    Random                   random(seed);
    std::vector<NamedTensor> tensors;
    const auto               add = [&](const std::string & name, ggml_type type, const std::vector<int64_t> & ne) {
        const int64_t n = std::accumulate(ne.begin(), ne.end(), int64_t(1), std::multiplies<int64_t>());
        tensors.push_back({ name, type, ne, random.weights(type, n) });
    };
    const auto add_ones = [&](const std::string & name) {
        tensors.push_back({ name, GGML_TYPE_F32, { shape.n_embd }, as_bytes(std::vector<float>(shape.n_embd, 1.0f)) });
    };
    add("token_embd.weight", GGML_TYPE_F32, { shape.n_embd, shape.n_vocab });
    add_ones("output_norm.weight");
    for (size_t i = 0; i < shape.layers.size(); ++i) {
        const std::string block = "blk." + std::to_string(i) + ".";
        const ggml_type   type  = shape.layers[i];
        add_ones(block + "attn_norm.weight");
        add_ones(block + "ffn_norm.weight");
        for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_output" }) {
            add(block + name + ".weight", GGML_TYPE_F32, { shape.n_embd, shape.n_embd });
        }
        if (shape.n_expert) {
            add(block + "ffn_gate_inp.weight", GGML_TYPE_F32, { shape.n_embd, shape.n_expert });
            add(block + "ffn_gate_exps.weight", type, { shape.n_embd, shape.n_ff, shape.n_expert });
            add(block + "ffn_up_exps.weight", type, { shape.n_embd, shape.n_ff, shape.n_expert });
            add(block + "ffn_down_exps.weight", type, { shape.n_ff, shape.n_embd, shape.n_expert });
            continue;
        }
        add(block + "ffn_gate.weight", type, { shape.n_embd, shape.n_ff });
        add(block + "ffn_up.weight", type, { shape.n_embd, shape.n_ff });
        add(block + "ffn_down.weight", type, { shape.n_ff, shape.n_embd });
        if (shape.biases) {
            add(block + "ffn_gate.bias", GGML_TYPE_F32, { shape.n_ff });
            add(block + "ffn_up.bias", GGML_TYPE_F32, { shape.n_ff });
            add(block + "ffn_down.bias", GGML_TYPE_F32, { shape.n_embd });
        }
    }
    write_gguf(path, keys.get(), tensors);
}

llama_model_ptr load_model(const char * path, bool use_mmap) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;
    params.load_mode          = use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    llama_model_ptr model(llama_model_load_from_file(path, params));
    CHECK(model, path);
    return model;
}

llama_model_ptr load_streamed(const char * path, const char * pattern) {
    const llama_model_tensor_buft_override overrides[] = { { pattern, coreinfer_unread_buffer_type() },
                                                           { nullptr, nullptr } };

    llama_model_params params    = llama_model_default_params();
    params.n_gpu_layers          = 0;
    params.load_mode             = LLAMA_LOAD_MODE_NONE;
    params.tensor_buft_overrides = overrides;
    llama_model_ptr model(llama_model_load_from_file(path, params));
    CHECK(model, path);
    return model;
}

llama_context_ptr make_context(llama_model * model, ggml_backend_sched_eval_callback callback, void * data,
                               int32_t n_threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_batch              = 64;
    params.n_ubatch             = 16;
    params.n_threads            = n_threads;
    params.n_threads_batch      = n_threads;
    // with a cache in half precision, rounding would hide what the tests compare
    params.type_k            = GGML_TYPE_F32;
    params.type_v            = GGML_TYPE_F32;
    params.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.cb_eval           = callback;
    params.cb_eval_user_data = data;
    llama_context_ptr ctx(llama_init_from_model(model, params));
    CHECK(ctx);
    return ctx;
}

std::vector<float> decode(llama_context * ctx, std::vector<llama_token> tokens) {
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data(), static_cast<int32_t>(tokens.size()))) == 0);
    const float * logits = llama_get_logits_ith(ctx, -1);
    CHECK(logits);
    return std::vector<float>(logits, logits + n_vocab);
}

coreinfer_ptr attach(llama_context * llama, const char * path, int32_t n_threads, bool packed) {
    coreinfer_context * ctx = nullptr;
    CHECK(coreinfer_new(llama, &path, 1, n_threads, packed, &ctx) == COREINFER_OK, coreinfer_last_error());
    return coreinfer_ptr(ctx);
}

} // namespace test

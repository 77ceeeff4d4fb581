// The architecture of patches/0002-opt.patch, and the end of its positions.

#include "check.h"
#include "gguf.h"
#include "model.h"

#include <cmath>
#include <functional>
#include <numeric>

using namespace test;

namespace {

constexpr int64_t kEmbd      = 64;
constexpr int64_t kFF        = 100;
constexpr int64_t kVocab     = 50;
constexpr int64_t kPositions = 40;
constexpr int64_t kLayers    = 3;

// As 125m, or as 350m: layer norms after attention and FFN, embeddings half as wide as the layers.
void write_opt(const char * path, bool like_350m) {
    gguf_context_ptr keys(gguf_init_empty());
    const auto       set = [&](const char * name, int64_t value) {
        gguf_set_val_u32(keys.get(), (std::string("opt.") + name).c_str(), static_cast<uint32_t>(value));
    };
    gguf_set_val_str(keys.get(), "general.architecture", "opt");
    gguf_set_val_str(keys.get(), "tokenizer.ggml.model", "none");
    set("vocab_size", kVocab);
    set("context_length", kPositions);
    set("embedding_length", kEmbd);
    set("feed_forward_length", kFF);
    set("block_count", kLayers);
    set("attention.head_count", 2);
    gguf_set_val_f32(keys.get(), "opt.attention.layer_norm_epsilon", 1e-5f);

    Random                   random(1);
    std::vector<NamedTensor> tensors;
    const auto               add = [&](const std::string & name, const std::vector<int64_t> & ne) {
        const int64_t n = std::accumulate(ne.begin(), ne.end(), int64_t(1), std::multiplies<int64_t>());
        tensors.push_back({ name, GGML_TYPE_F32, ne, as_bytes(random.floats(n, 0.2f)) });
    };
    const auto add_both = [&](const std::string & name, const std::vector<int64_t> & ne) {
        add(name + ".weight", ne);
        add(name + ".bias", { ne.back() });
    };
    const int64_t n_embd_tok = like_350m ? kEmbd / 2 : kEmbd;
    add("token_embd.weight", { n_embd_tok, kVocab });
    add("position_embd.weight", { kEmbd, kPositions });
    if (like_350m) {
        add("token_embd_proj.weight", { n_embd_tok, kEmbd });
        add("output_proj.weight", { kEmbd, n_embd_tok });
    } else {
        add_both("output_norm", { kEmbd });
    }
    for (int64_t i = 0; i < kLayers; ++i) {
        const std::string block = "blk." + std::to_string(i) + ".";
        add_both(block + (like_350m ? "attn_output_norm" : "attn_norm"), { kEmbd });
        add_both(block + (like_350m ? "layer_output_norm" : "ffn_norm"), { kEmbd });
        for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_output" }) {
            add_both(block + name, { kEmbd, kEmbd });
        }
        add_both(block + "ffn_up", { kEmbd, kFF });
        add_both(block + "ffn_down", { kFF, kEmbd });
    }
    write_gguf(path, keys.get(), tensors);
}

} // namespace

TEST(opt_without_its_inactive_neurons_gives_the_same_logits) {
    for (bool like_350m : { false, true }) {
        TempFile file;
        write_opt(file.path(), like_350m);
        llama_model_ptr                model   = load_model(file.path());
        llama_context_ptr              llama   = make_context(model.get());
        coreinfer_ptr                  ctx     = attach(llama.get(), file.path());
        const std::vector<llama_token> prompt  = { 3, 1, 4 };
        const auto                     restart = [&] { llama_memory_clear(llama_get_memory(llama.get()), true); };
        CHECK(coreinfer_n_ffn(ctx.get()) == kLayers);
        CHECK(coreinfer_stats_collect(ctx.get(), true, COREINFER_STAT_ACTIVE, 0.0f) == COREINFER_OK);
        for (llama_token token : prompt) { // one by one, for the last layer sees the last of a batch
            decode(llama.get(), { token });
        }
        CHECK(coreinfer_stats_collect(ctx.get(), false, 0, 0.0f) == COREINFER_OK);

        std::vector<std::vector<int32_t>> neurons(kLayers);
        std::vector<coreinfer_core>       cores;
        for (int32_t ffn = 0; ffn < kLayers; ++ffn) {
            std::vector<float> active(kFF);
            coreinfer_stats    stats = {};
            stats.active             = active.data();
            CHECK(coreinfer_stats_get(ctx.get(), ffn, &stats) == COREINFER_OK);
            for (int32_t i = 0; i < kFF; ++i) {
                if (active[i] > 0.0f) {
                    neurons[ffn].push_back(i);
                }
            }
            const auto n = static_cast<int32_t>(neurons[ffn].size());
            CHECK(0 < n && n < kFF, std::to_string(n));
            cores.push_back({ ffn, n, neurons[ffn].data(), nullptr, nullptr });
        }
        restart();
        const std::vector<float> dense = decode(llama.get(), prompt);
        CHECK(coreinfer_core_set(ctx.get(), cores.data(), kLayers) == COREINFER_OK, coreinfer_last_error());
        CHECK(coreinfer_core_use(ctx.get(), true) == COREINFER_OK);
        restart();
        const std::vector<float> core = decode(llama.get(), prompt);
        for (int64_t i = 0; i < kVocab; ++i) {
            CHECK(std::fabs(core[i] - dense[i]) <= 1e-4f, std::to_string(core[i]) + " for " + std::to_string(dense[i]));
        }
    }
}

TEST(a_position_beyond_the_learned_ones_is_refused) {
    TempFile file;
    write_opt(file.path(), false);
    llama_model_ptr          model = load_model(file.path());
    llama_context_ptr        llama = make_context(model.get());
    std::vector<llama_token> tokens(kPositions, 7);
    decode(llama.get(), tokens);
    llama_token next = 7;
    CHECK(llama_decode(llama.get(), llama_batch_get_one(&next, 1)) == -1);
    llama_memory_clear(llama_get_memory(llama.get()), true);
    tokens.push_back(7);
    CHECK(llama_decode(llama.get(), llama_batch_get_one(tokens.data(), kPositions + 1)) == -1);
    decode(llama.get(), { 1, 2, 3 });
}

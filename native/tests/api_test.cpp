// The C functions on whole models: what is evaluated, what is refused, and who frees what first.

#include "check.h"
#include "coreinfer.h"
#include "ggml-backend.h"
#include "kernels/packed_weights.h"
#include "model.h"
#include "quant.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

using namespace coreinfer;
using namespace test;

namespace {

// What a coreinfer_context is told to collect. The share is in percent, so that rounding it up is exact.
struct Extra {
    bool    normalized  = false;
    int64_t top_percent = 0;
    bool    active      = false;
};

// Watches the FFN activations of a context, and can put other values for the neurons left out.
struct Activations {
    struct Layer {
        std::vector<double> sum;
        std::vector<double> sum_sq;
        std::vector<double> normalized_sq;
        std::vector<double> top;
        std::vector<double> active;
        int64_t             n_tokens = 0;
        std::vector<bool>   kept; // empty: all
        std::vector<float>  fill;
    };

    std::map<int, Layer> layers;
    Extra                extra;

    void forget() {
        for (auto & [layer, at] : layers) {
            at = Layer();
        }
    }

    static bool evaluated(ggml_tensor * tensor, bool ask, void * data) {
        int layer = 0;
        int end   = 0;
        if (std::sscanf(ggml_get_name(tensor), "ffn_swiglu-%d%n", &layer, &end) != 1 || ggml_get_name(tensor)[end]) {
            return !ask; // a view of it has a longer name
        }
        if (!ask) {
            static_cast<Activations *>(data)->visit(layer, tensor);
        }
        return true;
    }

  private:
    void visit(int layer, ggml_tensor * tensor) {
        Layer &            at    = layers[layer];
        const int64_t      width = tensor->ne[0];
        std::vector<float> values(ggml_nelements(tensor));
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
        for (std::vector<double> * sums : { &at.sum, &at.sum_sq, &at.normalized_sq, &at.top, &at.active }) {
            sums->resize(width);
        }
        at.n_tokens += ggml_nrows(tensor);
        for (int64_t row = 0; row < ggml_nrows(tensor); ++row) {
            add_token(at, values.data() + row * width, width);
        }
        for (size_t i = 0; i < values.size(); ++i) {
            const int64_t neuron = static_cast<int64_t>(i) % width;
            if (!at.kept.empty() && !at.kept[neuron]) {
                values[i] = at.fill.empty() ? 0.0f : at.fill[neuron];
            }
        }
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    }

    void add_token(Layer & at, const float * act, int64_t width) const {
        double             norm = 0.0;
        std::vector<float> positive;
        for (int64_t i = 0; i < width; ++i) {
            norm += static_cast<double>(act[i]) * act[i];
            if (act[i] > 0.0f) {
                positive.push_back(act[i]);
            }
        }
        std::sort(positive.begin(), positive.end(), std::greater<float>());
        const size_t n_top = (extra.top_percent * positive.size() + 99) / 100;
        for (int64_t i = 0; i < width; ++i) {
            const double square = static_cast<double>(act[i]) * act[i];
            at.sum[i] += act[i];
            at.sum_sq[i] += square;
            at.normalized_sq[i] += extra.normalized ? square / norm : 0.0;
            at.top[i] += n_top && act[i] >= positive[n_top - 1];
            at.active[i] += extra.active && act[i] != 0.0f;
        }
    }
};

struct CoreSet {
    int32_t              ffn;
    std::vector<int32_t> neurons;
    std::vector<float>   fill;
    std::vector<uint8_t> levels = {};
};

coreinfer_status set_cores(coreinfer_context * ctx, const std::vector<CoreSet> & sets) {
    std::vector<coreinfer_core> cores;
    for (const CoreSet & set : sets) {
        cores.push_back({ set.ffn, static_cast<int32_t>(set.neurons.size()), set.neurons.data(),
                          set.fill.empty() ? nullptr : set.fill.data(),
                          set.levels.empty() ? nullptr : set.levels.data() });
    }
    return coreinfer_core_set(ctx, cores.data(), static_cast<int32_t>(cores.size()));
}

void mask(Activations & activations, const std::vector<CoreSet> & sets, int64_t n_ff) {
    for (auto & [layer, at] : activations.layers) {
        at.kept.clear();
    }
    for (const CoreSet & set : sets) {
        Activations::Layer & at = activations.layers[set.ffn];
        at.fill                 = set.fill;
        at.kept.assign(n_ff, false);
        for (int32_t neuron : set.neurons) {
            at.kept[neuron] = true;
        }
    }
}

float difference(const std::vector<float> & a, const std::vector<float> & b) {
    float largest = 0.0f;
    for (size_t i = 0; i < a.size(); ++i) {
        largest = std::max(largest, std::fabs(a[i] - b[i]));
    }
    return largest;
}

// A model in a file and loaded, with a context that a core set is for.
struct Loaded {
    explicit Loaded(const Shape & of = Shape(), bool use_mmap = true, int32_t n_threads = 1, bool packed = false) :
        shape(of) {
        write_model(file.path(), of, 7);
        coreinfer_load_packed(packed, false);
        model = load_model(file.path(), use_mmap);
        coreinfer_load_packed(false, false);
        llama   = make_context(model.get(), Activations::evaluated, &seen, n_threads);
        coreinf = attach(llama.get(), file.path(), 2, packed);
    }

    Shape             shape;
    TempFile          file;
    Activations       seen;
    llama_model_ptr   model;
    llama_context_ptr llama;
    coreinfer_ptr     coreinf;
};

coreinfer_status collect(coreinfer_context * ctx, const Extra & extra) {
    const uint32_t which = (extra.normalized ? COREINFER_STAT_NORMALIZED : 0) |
                           (extra.top_percent ? COREINFER_STAT_TOP : 0) | (extra.active ? COREINFER_STAT_ACTIVE : 0);
    return coreinfer_stats_collect(ctx, true, which, static_cast<float>(extra.top_percent) / 100.0f);
}

// The same for those who watch.
coreinfer_status collect(Loaded & loaded, const Extra & extra) {
    loaded.seen.extra = extra;
    return collect(loaded.coreinf.get(), extra);
}

const Extra kAll = { true, 40, true };

const std::vector<llama_token> kPrompt = { 1, 7, 3, 9, 22, 4, 4, 31, 8, 49, 0, 17, 25, 6, 2, 40, 11, 12, 35, 5 };

// Expects this status and a message that holds the part.
void check_refused(coreinfer_status got, coreinfer_status expected, const std::string & part) {
    CHECK(got == expected, std::to_string(got) + ": " + coreinfer_last_error());
    CHECK(std::string(coreinfer_last_error()).find(part) != std::string::npos, coreinfer_last_error());
}

} // namespace

//
// what is evaluated
//

TEST(a_core_graph_equals_the_dense_graph_with_the_other_neurons_at_their_fill) {
    Loaded            core;
    Activations       masked;
    llama_context_ptr dense = make_context(core.model.get(), Activations::evaluated, &masked);
    Random            random(1);
    llama_token       token = 3;
    for (int32_t n : { 1, 31, 32, 33, 64, 99, 100 }) {
        for (bool with_fill : { false, true }) {
            std::vector<CoreSet> sets;
            for (int32_t ffn = 0; ffn < 3; ++ffn) {
                sets.push_back(
                    { ffn, random.neurons(n, 100), with_fill ? random.floats(100, 0.3f) : std::vector<float>() });
            }
            CHECK(set_cores(core.coreinf.get(), sets) == COREINFER_OK, coreinfer_last_error());
            CHECK(coreinfer_core_use(core.coreinf.get(), true) == COREINFER_OK);
            mask(masked, sets, 100);

            const std::vector<float> expected = decode(dense.get(), { token, 5, 6 });
            const std::vector<float> got      = decode(core.llama.get(), { token, 5, 6 });
            CHECK(difference(got, expected) <= 1e-4f, std::to_string(n));
            token = static_cast<llama_token>(random.below(50));
        }
    }
}

TEST(a_core_set_that_changes_at_every_token_stays_exact) {
    Loaded            core;
    Activations       masked;
    llama_context_ptr dense = make_context(core.model.get(), Activations::evaluated, &masked);
    Random            random(2);

    CHECK(difference(decode(core.llama.get(), kPrompt), decode(dense.get(), kPrompt)) == 0.0f);
    for (int step = 0; step < 50; ++step) {
        std::vector<CoreSet> sets;
        for (int32_t ffn = 0; ffn < 3; ++ffn) {
            if (random.below(4)) {
                sets.push_back({ ffn, random.neurons(1 + random.below(100), 100),
                                 random.below(2) ? random.floats(100, 0.3f) : std::vector<float>() });
            }
        }
        const int  graph = random.below(4);
        const bool use   = graph == COREINFER_CORE || graph == COREINFER_DRAFT;
        CHECK(set_cores(core.coreinf.get(), sets) == COREINFER_OK, coreinfer_last_error());
        CHECK(coreinfer_graph_use(core.coreinf.get(), graph) == COREINFER_OK);
        CHECK(coreinfer_stats_collect(core.coreinf.get(), random.below(2), random.below(4), 0.4f) == COREINFER_OK);
        mask(masked, use ? sets : std::vector<CoreSet>(), 100);
        const auto token = static_cast<llama_token>(random.below(50));
        CHECK(difference(decode(core.llama.get(), { token }), decode(dense.get(), { token })) <= 1e-4f,
              std::to_string(step));
    }
}

TEST(core_graphs_of_every_type_are_near_the_dense_graph_with_the_other_neurons_at_their_fill) {
    Random random(3);
    for (ggml_type type : weight_types()) {
        Shape shape;
        shape.n_embd = ggml_blck_size(type) > 32 ? 256 : 96;
        shape.n_ff   = ggml_blck_size(type) > 32 ? 512 : 160;
        shape.layers = { type };
        Loaded            core(shape);
        Activations       masked;
        llama_context_ptr dense = make_context(core.model.get(), Activations::evaluated, &masked);
        llama_context_ptr whole = make_context(core.model.get());
        const auto        n_ff  = static_cast<int32_t>(shape.n_ff);

        const std::vector<CoreSet> sets = { { 0, random.neurons(n_ff / 2 + 1, n_ff), random.floats(n_ff, 0.1f) } };
        CHECK(set_cores(core.coreinf.get(), sets) == COREINFER_OK, coreinfer_last_error());
        CHECK(coreinfer_core_use(core.coreinf.get(), true) == COREINFER_OK);
        mask(masked, sets, n_ff);

        // how far off a core set is that has no effect, or the wrong one
        const std::vector<float> expected = decode(dense.get(), kPrompt);
        const float              effect   = difference(decode(whole.get(), kPrompt), expected);
        const float              error    = difference(decode(core.llama.get(), kPrompt), expected);
        // where ARM has FP16 arithmetic, ggml adds the products of F16 in it
        const float allowed = type == GGML_TYPE_F16                             ? 3e-3f
                              : type == GGML_TYPE_F32 || type == GGML_TYPE_BF16 ? 1e-3f
                                                                                : 0.25f;
        CHECK(error <= allowed * effect,
              std::string(ggml_type_name(type)) + ": " + std::to_string(error) + " of " + std::to_string(effect));
    }
}

TEST(without_a_core_set_the_logits_are_those_of_a_context_of_its_own) {
    Loaded            core;
    llama_context_ptr plain = make_context(core.model.get());
    CHECK(decode(core.llama.get(), kPrompt) == decode(plain.get(), kPrompt));
    CHECK(coreinfer_core_use(core.coreinf.get(), true) == COREINFER_OK);
    CHECK(decode(core.llama.get(), { 1 }) == decode(plain.get(), { 1 }));

    CHECK(set_cores(core.coreinf.get(), { { 0, { 5 }, {} } }) == COREINFER_OK);
    CHECK(coreinfer_core_use(core.coreinf.get(), false) == COREINFER_OK);
    CHECK(decode(core.llama.get(), { 2 }) == decode(plain.get(), { 2 }));

    core.coreinf.reset();
    CHECK(decode(core.llama.get(), { 3 }) == decode(plain.get(), { 3 }));
}

TEST(drafts_are_not_collected_and_what_is_verified_has_the_bits_of_single_tokens) {
    Loaded            core;
    llama_context_ptr plain = make_context(core.model.get());
    CHECK(collect(core, Extra()) == COREINFER_OK);
    CHECK(set_cores(core.coreinf.get(), { { 1, { 5, 50 }, {} } }) == COREINFER_OK);
    CHECK(coreinfer_graph_use(core.coreinf.get(), COREINFER_DRAFT) == COREINFER_OK);
    decode(core.llama.get(), kPrompt);
    coreinfer_stats stats = {};
    CHECK(coreinfer_stats_get(core.coreinf.get(), 0, &stats) == COREINFER_OK);
    CHECK(stats.n_tokens == 0.0f);

    llama_memory_clear(llama_get_memory(core.llama.get()), false);
    CHECK(coreinfer_graph_use(core.coreinf.get(), COREINFER_VERIFY) == COREINFER_OK);
    std::vector<float> last;
    for (llama_token token : kPrompt) {
        last = decode(plain.get(), { token });
    }
    const std::vector<float> all = decode(core.llama.get(), kPrompt);
    CHECK(std::equal(last.rbegin(), last.rend(), all.rbegin()));
    CHECK(coreinfer_stats_get(core.coreinf.get(), 0, &stats) == COREINFER_OK);
    CHECK(stats.n_tokens == static_cast<float>(kPrompt.size()));

    check_refused(coreinfer_graph_use(core.coreinf.get(), 5), COREINFER_INVALID, "5 is no coreinfer_graph");
}

// Two kinds of weights that there are kernels for, and one that there are none for.
static Shape packable_shape() {
    Shape shape;
    shape.n_embd = 256;
    shape.n_ff   = 512;
    shape.biases = false;
    shape.layers = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K };
    return shape;
}

// The logits of a token after a prompt.
static std::vector<float> again(llama_context * llama) {
    llama_memory_clear(llama_get_memory(llama), true);
    decode(llama, kPrompt);
    return decode(llama, { 3 });
}

static uint64_t packed_bytes(const llama_context * llama) {
    coreinfer_memory memory = {};
    CHECK(coreinfer_memory_get(llama, -1, &memory) == COREINFER_OK, coreinfer_last_error());
    return memory.packed;
}

TEST(a_model_that_is_loaded_packed_differs_in_rounding_and_nothing_else) {
    const bool any = coreinfer_load_packed(true, false);
    CHECK(any == (packed_buffer_type() != nullptr));
    const Loaded        packed(packable_shape(), true, 1, true);
    const Loaded        plain(packable_shape());
    coreinfer_context * ctx    = plain.coreinf.get();
    const auto          stock  = again(plain.llama.get());
    const auto          ours   = again(packed.llama.get());
    const auto          prompt = decode(packed.llama.get(), kPrompt);
    CHECK((packed_bytes(packed.llama.get()) > 0) == any);
    CHECK(packed_bytes(plain.llama.get()) == 0);
    CHECK((ours == stock) == !any);

    // about half of a layer's neurons
    CHECK(set_cores(ctx, { { 0, Random(5).neurons(300, 512), {} } }) == COREINFER_OK, coreinfer_last_error());
    CHECK(coreinfer_core_use(ctx, true) == COREINFER_OK);
    const std::vector<float> half = again(plain.llama.get());
    CHECK(difference(ours, stock) <= 0.1f * difference(half, stock));
    CHECK(coreinfer_core_use(ctx, false) == COREINFER_OK);
    again(plain.llama.get());
    CHECK(difference(prompt, decode(plain.llama.get(), kPrompt)) <= 0.1f * difference(half, stock));
}

TEST(core_sets_of_a_packed_model_are_packed) {
    const bool                 any = packed_buffer_type() != nullptr;
    const Loaded               packed(packable_shape(), true, 1, true);
    const Loaded               plain(packable_shape());
    const std::vector<CoreSet> sets  = { { 0, Random(5).neurons(300, 512), {} } };
    const std::vector<float>   dense = again(packed.llama.get());
    std::vector<int32_t>       all(512);
    std::iota(all.begin(), all.end(), 0);

    std::vector<std::vector<float>> halves;
    for (const Loaded * loaded : { &packed, &plain }) {
        CHECK(set_cores(loaded->coreinf.get(), sets) == COREINFER_OK, coreinfer_last_error());
        CHECK(coreinfer_core_use(loaded->coreinf.get(), true) == COREINFER_OK);
        halves.push_back(again(loaded->llama.get()));
    }
    CHECK((halves[0] == halves[1]) == !any);
    CHECK(difference(halves[0], halves[1]) <= 0.1f * difference(halves[0], dense));
    // all neurons are the dense FFN, to the last bit
    CHECK(set_cores(packed.coreinf.get(), { { 0, all, {} }, { 1, all, {} }, { 2, all, {} } }) == COREINFER_OK);
    CHECK(again(packed.llama.get()) == dense);
}

TEST(core_sets_with_levels_change_and_go_back_to_none) {
    const Loaded         loaded(packable_shape(), true, 1, true);
    coreinfer_context *  ctx   = loaded.coreinf.get();
    coreinfer_ffn        ffn   = {};
    const auto           dense = again(loaded.llama.get());
    std::vector<uint8_t> levels;
    for (size_t i = 0; i < 300; ++i) {
        levels.push_back(static_cast<uint8_t>(i % COREINFER_N_LEVELS));
    }
    const std::vector<CoreSet> mixed = { { 0, Random(5).neurons(300, 512), {}, levels } };
    CHECK(coreinfer_ffn_get(ctx, 0, &ffn) == COREINFER_OK && ffn.neuron_bytes[0] > 0.0f);
    if (!packed_buffer_type()) {
        CHECK(ffn.neuron_bytes[1] == 0.0f && ffn.neuron_bytes[2] == 0.0f);
        check_refused(set_cores(ctx, mixed), COREINFER_UNSUPPORTED, "cannot have levels");
        return;
    }
    CHECK(ffn.neuron_bytes[0] > ffn.neuron_bytes[2] && ffn.neuron_bytes[1] > ffn.neuron_bytes[2] &&
          ffn.neuron_bytes[2] > ffn.neuron_bytes[3]);
    for (int level = 0; level < COREINFER_N_LEVELS; ++level) {
        const auto  of   = static_cast<coreinfer_level>(level);
        const float rows = (ffn.gated ? 2.0f : 1.0f) * coreinfer_level_bytes(of, ffn.up_type, false, ffn.n_in);
        const float down = coreinfer_level_bytes(of, ffn.down_type, true, 1024);
        CHECK(std::fabs(rows + down * static_cast<float>(ffn.n_out) / 1024.0f - ffn.neuron_bytes[level]) < 0.5f);
    }
    CHECK(coreinfer_level_bytes(COREINFER_N_LEVELS, ffn.up_type, false, 1024) == 0.0f);
    CHECK(coreinfer_level_bytes(COREINFER_LEVEL_3_BITS, GGML_TYPE_F32, false, 1024) == 0.0f);
    CHECK(coreinfer_level_bytes(COREINFER_LEVEL_3_BITS, -1, true, 1024) == 0.0f);
    CHECK(coreinfer_level_bytes(COREINFER_LEVEL_3_BITS, ffn.up_type, false, -32) == 0.0f);
    CHECK(coreinfer_core_use(ctx, true) == COREINFER_OK);
    const auto logits = [&](std::vector<uint8_t> of_each) {
        CHECK(set_cores(ctx, { { 0, mixed[0].neurons, {}, of_each } }) == COREINFER_OK, coreinfer_last_error());
        return again(loaded.llama.get());
    };
    const auto full = logits({});
    const auto low  = logits(levels);
    CHECK(low != full && difference(low, full) < difference(full, dense));
    CHECK(logits(std::vector<uint8_t>(300, COREINFER_LEVEL_FULL)) == full);
    std::reverse(levels.begin(), levels.end()); // of the same sizes: written over
    const auto other = logits(levels);
    CHECK(other != low);
    std::reverse(levels.begin(), levels.end());
    CHECK(logits(levels) == low);
    CHECK(coreinfer_core_set(ctx, nullptr, 0) == COREINFER_OK);
    CHECK(again(loaded.llama.get()) == dense);
}

TEST(levels_that_make_no_sense_are_refused) {
    const Loaded        packed(packable_shape(), true, 1, true);
    const Loaded        plain(packable_shape());
    coreinfer_context * ctx = packed.coreinf.get();
    check_refused(set_cores(ctx, { { 0, { 4, 5 }, {}, { 0, 4 } } }), COREINFER_INVALID, "level 4 at position 1");
    check_refused(set_cores(ctx, { { 0, { 4, 5 }, {}, { 255, 0 } } }), COREINFER_INVALID, "level 255");
    check_refused(set_cores(plain.coreinf.get(), { { 0, { 4, 5 }, {}, { 0, 1 } } }), COREINFER_UNSUPPORTED,
                  "cannot have levels");
    float weights[32] = {};
    check_refused(coreinfer_level_round(COREINFER_LEVEL_FULL, weights, 32, weights), COREINFER_INVALID, "level 0");
    check_refused(coreinfer_level_round(COREINFER_LEVEL_2_BITS, weights, 31, weights), COREINFER_INVALID, "31 weights");
    check_refused(coreinfer_level_round(COREINFER_LEVEL_2_BITS, weights, -32, weights), COREINFER_INVALID, "-32");
}

TEST(contexts_of_one_model_have_core_sets_of_their_own) {
    Loaded                     a;
    Activations                masked_a;
    Activations                masked_b;
    llama_context_ptr          b       = make_context(a.model.get());
    coreinfer_ptr              of_b    = attach(b.get(), a.file.path());
    llama_context_ptr          dense_a = make_context(a.model.get(), Activations::evaluated, &masked_a);
    llama_context_ptr          dense_b = make_context(a.model.get(), Activations::evaluated, &masked_b);
    Random                     random(4);
    const std::vector<CoreSet> sets_a = { { 0, random.neurons(40, 100), {} }, { 2, random.neurons(7, 100), {} } };
    const std::vector<CoreSet> sets_b = { { 1, random.neurons(50, 100), {} } };
    CHECK(set_cores(a.coreinf.get(), sets_a) == COREINFER_OK);
    CHECK(set_cores(of_b.get(), sets_b) == COREINFER_OK);
    CHECK(coreinfer_core_use(a.coreinf.get(), true) == COREINFER_OK);
    CHECK(coreinfer_core_use(of_b.get(), true) == COREINFER_OK);
    mask(masked_a, sets_a, 100);
    mask(masked_b, sets_b, 100);
    for (llama_token token : { 1, 2, 3 }) {
        CHECK(difference(decode(a.llama.get(), { token }), decode(dense_a.get(), { token })) <= 1e-4f);
        CHECK(difference(decode(b.get(), { token }), decode(dense_b.get(), { token })) <= 1e-4f);
    }
    a.coreinf.reset();
    a.llama.reset();
    CHECK(difference(decode(b.get(), { 4 }), decode(dense_b.get(), { 4 })) <= 1e-4f);
}

//
// what is told
//

TEST(the_constants_are_those_that_the_library_works_with) {
    coreinfer_constants constants = {};
    coreinfer_constants_get(&constants);
    CHECK(constants.block == kBlock);
    CHECK(constants.lookup_rows > 0 && constants.stream_min_chunks > 0 && constants.stream_chunk > 0);
    const std::string known = std::string(" ") + constants.kernels + " ";
    for (const PackedKernels * kernels : packed_kernels()) {
        CHECK(known.find(std::string(" ") + kernels->name + " ") != std::string::npos, kernels->name);
    }
}

TEST(the_kernels_in_use_are_of_those_that_the_processor_can_run) {
    const std::string here = coreinfer_kernels_here(), chosen = coreinfer_kernels_chosen();
    CHECK(chosen == "none" || (" " + here + " ").find(" " + chosen + " ") != std::string::npos);
}

TEST(ffns_are_told_as_the_model_has_them) {
    Shape shape;
    shape.n_embd = 96;
    shape.n_ff   = 160;
    shape.layers = { GGML_TYPE_Q4_0, GGML_TYPE_F16 };
    Loaded loaded(shape);
    CHECK(coreinfer_api_version() == COREINFER_API_VERSION);
    CHECK(coreinfer_n_ffn(loaded.coreinf.get()) == 2);
    uint64_t all = 0;
    for (int32_t i = 0; i < 2; ++i) {
        coreinfer_ffn ffn;
        CHECK(coreinfer_ffn_get(loaded.coreinf.get(), i, &ffn) == COREINFER_OK);
        CHECK(ffn.layer == i && ffn.n_in == 96 && ffn.n_ff == 160 && ffn.n_out == 96 && ffn.gated);
        CHECK(ffn.up_type == shape.layers[i] && ffn.down_type == shape.layers[i]);
        CHECK(ffn.n_bytes == 3 * ggml_row_size(shape.layers[i], 96 * 160) + sizeof(float) * (160 + 160 + 96));
        all += ffn.n_bytes;
    }
    CHECK(coreinfer_core_bytes(loaded.coreinf.get()) == all);
    CHECK(set_cores(loaded.coreinf.get(), { { 1, { 3, 4 }, {} } }) == COREINFER_OK);
    coreinfer_ffn first;
    CHECK(coreinfer_ffn_get(loaded.coreinf.get(), 0, &first) == COREINFER_OK);
    CHECK(coreinfer_core_bytes(loaded.coreinf.get()) ==
          first.n_bytes + 3 * 2 * 96 * 32 + sizeof(float) * (32 + 32 + 96));
    CHECK(set_cores(loaded.coreinf.get(), {}) == COREINFER_OK);
    CHECK(coreinfer_core_bytes(loaded.coreinf.get()) == all);
}

// sum, sum_sq, normalized_sq, top, active
using Sums = std::array<std::vector<float>, 5>;

static Sums statistics_of(coreinfer_context * ctx, int32_t ffn, int64_t n_ff, int64_t n_tokens) {
    Sums sums;
    sums.fill(std::vector<float>(n_ff, -1.0f));
    coreinfer_stats stats = { sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data(), sums[4].data(), -1.0f };
    CHECK(coreinfer_stats_get(ctx, ffn, &stats) == COREINFER_OK);
    CHECK(stats.n_tokens == static_cast<float>(n_tokens), std::to_string(stats.n_tokens));
    return sums;
}

static void check_statistics(coreinfer_context * ctx, const Activations & seen, int64_t n_ff) {
    for (int32_t ffn = 0; ffn < coreinfer_n_ffn(ctx); ++ffn) {
        const auto         at = seen.layers.find(ffn);
        Activations::Layer layer;
        for (std::vector<double> * sums :
             { &layer.sum, &layer.sum_sq, &layer.normalized_sq, &layer.top, &layer.active }) {
            sums->resize(n_ff);
        }
        if (at != seen.layers.end() && !at->second.sum.empty()) {
            layer = at->second;
        }
        const auto [sum, sum_sq, normalized_sq, top, active] = statistics_of(ctx, ffn, n_ff, layer.n_tokens);
        for (int64_t i = 0; i < n_ff; ++i) {
            // the sum of magnitudes is at most sqrt(n * sum of squares)
            CHECK(std::fabs(sum[i] - layer.sum[i]) <=
                  1e-6 * std::sqrt(static_cast<double>(layer.n_tokens) * layer.sum_sq[i]));
            CHECK(std::fabs(sum_sq[i] - layer.sum_sq[i]) <= 1e-6 * layer.sum_sq[i]);
            CHECK(std::fabs(normalized_sq[i] - layer.normalized_sq[i]) <= 2e-6 * layer.normalized_sq[i],
                  std::to_string(normalized_sq[i]) + " for " + std::to_string(layer.normalized_sq[i]));
            CHECK(top[i] == layer.top[i], std::to_string(top[i]) + " for " + std::to_string(layer.top[i]));
            CHECK(active[i] == layer.active[i], std::to_string(active[i]) + " for " + std::to_string(layer.active[i]));
        }
    }
}

TEST(statistics_are_the_sums_over_the_tokens_evaluated) {
    for (const Extra & extra : { Extra(), Extra{ true, 0 }, Extra{ false, 40 }, Extra{ false, 0, true }, kAll }) {
        for (int64_t n_ff : { 100, 64, 31, 193 }) {
            Shape shape;
            shape.n_ff = n_ff;
            Loaded              loaded(shape, /*use_mmap=*/true, /*n_threads=*/n_ff == 193 ? 3 : 1);
            coreinfer_context * ctx = loaded.coreinf.get();
            check_statistics(ctx, loaded.seen, n_ff);

            CHECK(collect(loaded, extra) == COREINFER_OK);
            decode(loaded.llama.get(), kPrompt); // two ubatches
            check_statistics(ctx, loaded.seen, n_ff);
            CHECK(loaded.seen.layers[0].n_tokens == static_cast<int64_t>(kPrompt.size()));
            CHECK(loaded.seen.layers[2].n_tokens == 1);
            decode(loaded.llama.get(), { 9 });
            decode(loaded.llama.get(), { 10 });
            check_statistics(ctx, loaded.seen, n_ff);

            const Activations before = loaded.seen;
            CHECK(coreinfer_stats_collect(ctx, false, 0, 0.0f) == COREINFER_OK);
            decode(loaded.llama.get(), { 11, 12 });
            check_statistics(ctx, before, n_ff);

            CHECK(coreinfer_stats_clear(ctx) == COREINFER_OK);
            loaded.seen.forget();
            check_statistics(ctx, loaded.seen, n_ff);
            CHECK(collect(loaded, extra) == COREINFER_OK);
            decode(loaded.llama.get(), { 13, 14, 15 });
            check_statistics(ctx, loaded.seen, n_ff);
        }
    }
}

TEST(statistics_that_are_not_collected_are_zero) {
    const auto is_zero = [](const std::vector<float> & values) {
        return std::all_of(values.begin(), values.end(), [](float x) { return x == 0.0f; });
    };
    // a share of 0 is of no neuron
    for (const auto & [extra, top_share] : { std::pair<uint32_t, float>(0, 0.0f),
                                             { 0, 0.4f },
                                             { COREINFER_STAT_NORMALIZED, 0.4f },
                                             { COREINFER_STAT_TOP, 0.4f },
                                             { COREINFER_STAT_TOP, 0.0f },
                                             { COREINFER_STAT_ACTIVE, 0.0f } }) {
        Loaded loaded;
        CHECK(coreinfer_stats_collect(loaded.coreinf.get(), true, extra, top_share) == COREINFER_OK);
        decode(loaded.llama.get(), kPrompt);
        const auto [sum, sum_sq, normalized_sq, top, active] =
            statistics_of(loaded.coreinf.get(), 0, 100, static_cast<int64_t>(kPrompt.size()));
        CHECK(!is_zero(sum) && !is_zero(sum_sq));
        CHECK(is_zero(normalized_sq) == !(extra & COREINFER_STAT_NORMALIZED), std::to_string(extra));
        CHECK(is_zero(top) == !((extra & COREINFER_STAT_TOP) && top_share > 0.0f), std::to_string(extra));
        CHECK(is_zero(active) == !(extra & COREINFER_STAT_ACTIVE), std::to_string(extra));
    }
}

TEST(the_largest_are_the_share_asked_for_of_a_tokens_positive_neurons) {
    for (int64_t percent : { 1, 40, 75, 100 }) {
        Loaded loaded;
        CHECK(collect(loaded, { false, percent }) == COREINFER_OK);
        for (llama_token token = 0; token < 5; ++token) {
            decode(loaded.llama.get(), { token });
        }
        check_statistics(loaded.coreinf.get(), loaded.seen, 100);
    }
}

TEST(what_is_collected_may_change_from_token_to_token) {
    Loaded      loaded;
    llama_token token = 0;
    for (const Extra & extra : { Extra(), kAll, Extra{ false, 40 }, Extra{ false, 41 }, Extra{ true, 0 }, Extra(),
                                 Extra{ true, 100 }, Extra{ true, 0 }, kAll }) {
        // twice, so that the second makes use of the graph of the first, which the next must not do
        CHECK(collect(loaded, extra) == COREINFER_OK);
        decode(loaded.llama.get(), { token++ });
        decode(loaded.llama.get(), { token++ });
        check_statistics(loaded.coreinf.get(), loaded.seen, 100);
    }
}

TEST(several_threads_collect_what_a_context_that_is_watched_collects) {
    for (const auto & [n_threads, n_ff] : { std::pair<int32_t, int64_t>(1, 193), { 2, 31 }, { 3, 400 }, { 5, 193 } }) {
        Shape shape;
        shape.n_ff = n_ff;
        Loaded loaded(shape, /*use_mmap=*/true, n_threads);
        // whose graph is computed at a stretch, not node by node
        llama_context_ptr whole    = make_context(loaded.model.get(), nullptr, nullptr, n_threads);
        coreinfer_ptr     of_whole = attach(whole.get(), loaded.file.path());
        CHECK(collect(loaded, kAll) == COREINFER_OK);
        CHECK(collect(of_whole.get(), kAll) == COREINFER_OK);
        // fewer tokens than threads, and more
        for (const auto & tokens : { std::vector<llama_token>{ 3 }, { 7, 8 }, kPrompt, { 9 } }) {
            CHECK(decode(whole.get(), tokens) == decode(loaded.llama.get(), tokens));
        }
        check_statistics(loaded.coreinf.get(), loaded.seen, n_ff);
        check_statistics(of_whole.get(), loaded.seen, n_ff);
    }
}

TEST(statistics_leave_out_what_is_evaluated_with_a_core) {
    // 90 neurons are padded to 96, as wide as the dense activation: they must not be taken for it
    Shape shape;
    shape.n_ff = 96;
    Loaded              loaded(shape);
    coreinfer_context * ctx = loaded.coreinf.get();
    Random              random(5);
    CHECK(collect(loaded, kAll) == COREINFER_OK);
    decode(loaded.llama.get(), kPrompt);
    const Activations before = loaded.seen;
    CHECK(set_cores(ctx, { { 0, random.neurons(90, 96), {} }, { 1, random.neurons(12, 96), {} } }) == COREINFER_OK);
    CHECK(coreinfer_core_use(ctx, true) == COREINFER_OK);
    decode(loaded.llama.get(), { 1 });

    Activations expected = before;
    expected.layers[2]   = loaded.seen.layers[2]; // stayed dense
    check_statistics(ctx, expected, 96);
}

TEST(each_result_of_the_statistics_may_be_left_out) {
    Loaded loaded;
    CHECK(collect(loaded, kAll) == COREINFER_OK);
    decode(loaded.llama.get(), kPrompt);
    const auto n_tokens = static_cast<int64_t>(kPrompt.size());
    const Sums all      = statistics_of(loaded.coreinf.get(), 1, 100, n_tokens);
    for (unsigned wanted = 0; wanted < 32; ++wanted) {
        Sums       sums;
        const auto place = [&](unsigned i) {
            sums[i].assign(100, -1.0f);
            return wanted & (1u << i) ? sums[i].data() : nullptr;
        };
        coreinfer_stats stats = { place(0), place(1), place(2), place(3), place(4), -1.0f };
        CHECK(coreinfer_stats_get(loaded.coreinf.get(), 1, &stats) == COREINFER_OK);
        CHECK(stats.n_tokens == static_cast<float>(n_tokens));
        for (unsigned i = 0; i < 5; ++i) {
            CHECK(sums[i] == (wanted & (1u << i) ? all[i] : std::vector<float>(100, -1.0f)));
        }
    }
}

//
// what is refused
//

TEST(a_model_without_a_dense_ffn_is_not_supported) {
    Shape shape;
    shape.n_expert = 2;
    TempFile file;
    write_model(file.path(), shape, 1);
    llama_model_ptr     model  = load_model(file.path());
    llama_context_ptr   llama  = make_context(model.get());
    coreinfer_context * result = nullptr;
    const char *        path   = file.path();
    check_refused(coreinfer_new(llama.get(), &path, 1, 2, false, &result), COREINFER_UNSUPPORTED, "no dense FFN");
    CHECK(!result);
    decode(llama.get(), kPrompt);
}

TEST(a_context_that_cannot_be_attached_to_is_left_as_it_was) {
    TempFile file;
    TempFile other;
    Shape    small;
    small.n_embd = 32;
    write_model(file.path(), Shape(), 7);
    write_model(other.path(), small, 7);
    llama_model_ptr     model  = load_model(file.path());
    llama_context_ptr   llama  = make_context(model.get());
    llama_context_ptr   plain  = make_context(model.get());
    coreinfer_context * result = nullptr;
    const char *        good   = file.path();
    const char *        wrong  = other.path();
    const char *        none   = "/is/not/here.gguf";
    check_refused(coreinfer_new(llama.get(), &wrong, 1, 2, false, &result), COREINFER_UNSUPPORTED, "no dense FFN");
    check_refused(coreinfer_new(llama.get(), &none, 1, 2, false, &result), COREINFER_IO, none);
    check_refused(coreinfer_new(llama.get(), &good, 0, 2, false, &result), COREINFER_INVALID, "path");
    check_refused(coreinfer_new(llama.get(), &good, -3, 2, false, &result), COREINFER_INVALID, "path");
    check_refused(coreinfer_new(llama.get(), nullptr, 1, 2, false, &result), COREINFER_INVALID, "path");
    check_refused(coreinfer_new(nullptr, &good, 1, 2, false, &result), COREINFER_INVALID, "llama_context");
    check_refused(coreinfer_new(llama.get(), &good, 1, 2, false, nullptr), COREINFER_INVALID, "result");
    CHECK(!result);
    CHECK(decode(llama.get(), kPrompt) == decode(plain.get(), kPrompt));
}

TEST(core_sets_that_make_no_sense_are_refused_and_leave_none) {
    Loaded              loaded;
    coreinfer_context * ctx     = loaded.coreinf.get();
    const uint64_t      dense   = coreinfer_core_bytes(ctx);
    const auto          refused = [&](const std::vector<CoreSet> & sets, const std::string & part) {
        CHECK(set_cores(ctx, { { 1, { 4, 5 }, {} } }) == COREINFER_OK);
        CHECK(coreinfer_core_bytes(ctx) < dense);
        check_refused(set_cores(ctx, sets), COREINFER_INVALID, part);
        CHECK(coreinfer_core_bytes(ctx) == dense);
    };
    refused({ { 3, { 0 }, {} } }, "3 dense FFNs");
    refused({ { -1, { 0 }, {} } }, "FFN -1");
    refused({ { 0, {}, {} } }, "1 to 100 neurons");
    refused({ { 0, std::vector<int32_t>(101, 0), {} } }, "not 101");
    refused({ { 0, { 5, 5 }, {} } }, "neuron 5 at position 1");
    refused({ { 0, { 5, 4 }, {} } }, "neuron 4 at position 1");
    refused({ { 0, { -1, 4 }, {} } }, "neuron -1");
    refused({ { 0, { 4, 100 }, {} } }, "neuron 100");
    refused({ { 0, { INT32_MIN }, {} } }, "neuron -2147483648");
    refused({ { 0, { 4 }, {} }, { 1, { 4 }, {} }, { 0, { 5 }, {} } }, "named twice");

    const coreinfer_core no_neurons = { 0, 1, nullptr, nullptr, nullptr };
    check_refused(coreinfer_core_set(ctx, &no_neurons, 1), COREINFER_INVALID, "neurons");
    const int32_t        neuron   = 0;
    const coreinfer_core negative = { 0, -1, &neuron, nullptr, nullptr };
    check_refused(coreinfer_core_set(ctx, &negative, 1), COREINFER_INVALID, "not -1");
    check_refused(coreinfer_core_set(ctx, nullptr, 1), COREINFER_INVALID, "1 core sets");
    check_refused(coreinfer_core_set(ctx, nullptr, -1), COREINFER_INVALID, "-1 core sets");
    CHECK(coreinfer_core_set(ctx, nullptr, 0) == COREINFER_OK);

    llama_context_ptr plain = make_context(loaded.model.get());
    CHECK(coreinfer_core_use(ctx, true) == COREINFER_OK);
    CHECK(decode(loaded.llama.get(), kPrompt) == decode(plain.get(), kPrompt));
}

TEST(a_context_that_was_freed_and_is_null_is_refused) {
    coreinfer_ffn    ffn   = {};
    coreinfer_stats  stats = {};
    coreinfer_stream read  = {};
    float            norm  = 0;
    CHECK(coreinfer_ffn_get(nullptr, 0, &ffn) == COREINFER_INVALID);
    CHECK(coreinfer_stats_collect(nullptr, true, 0, 0) == COREINFER_INVALID);
    CHECK(coreinfer_stats_clear(nullptr) == COREINFER_INVALID);
    CHECK(coreinfer_stats_get(nullptr, 0, &stats) == COREINFER_INVALID);
    CHECK(coreinfer_down_norms(nullptr, &norm) == COREINFER_INVALID);
    CHECK(coreinfer_core_set(nullptr, nullptr, 0) == COREINFER_INVALID);
    CHECK(coreinfer_core_use(nullptr, true) == COREINFER_INVALID);
    CHECK(coreinfer_graph_use(nullptr, COREINFER_DRAFT) == COREINFER_INVALID);
    CHECK(coreinfer_stream_ahead(nullptr, 1) == COREINFER_INVALID);
    CHECK(coreinfer_stream_begin(nullptr, 1) == COREINFER_INVALID);
    CHECK(coreinfer_stream_end(nullptr, &read) == COREINFER_INVALID);
    CHECK(coreinfer_n_ffn(nullptr) == 0);
    CHECK(coreinfer_core_bytes(nullptr) == 0);
}

TEST(an_ffn_that_is_not_there_is_refused) {
    Loaded          loaded;
    coreinfer_ffn   ffn;
    coreinfer_stats stats = {};
    for (int32_t i : { -1, 3, INT32_MAX, INT32_MIN }) {
        check_refused(coreinfer_ffn_get(loaded.coreinf.get(), i, &ffn), COREINFER_INVALID, "FFN " + std::to_string(i));
        check_refused(coreinfer_stats_get(loaded.coreinf.get(), i, &stats), COREINFER_INVALID,
                      "FFN " + std::to_string(i));
    }
}

TEST(statistics_that_make_no_sense_are_refused_and_those_collected_go_on) {
    Loaded              loaded;
    coreinfer_context * ctx = loaded.coreinf.get();
    CHECK(collect(loaded, kAll) == COREINFER_OK);
    decode(loaded.llama.get(), kPrompt);
    const uint32_t top = COREINFER_STAT_TOP;
    for (bool on : { false, true }) {
        for (float share : { -0.1f, 1.1f, -FLT_TRUE_MIN, std::nextafter(1.0f, 2.0f), FLT_MAX, -FLT_MAX,
                             std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN() }) {
            check_refused(coreinfer_stats_collect(ctx, on, top, share), COREINFER_INVALID, "top_share must be");
            check_refused(coreinfer_stats_collect(ctx, on, 0, share), COREINFER_INVALID, "top_share must be");
        }
        for (uint32_t extra : { 8u, 15u, 16u, 0x80000000u, UINT32_MAX }) {
            check_refused(coreinfer_stats_collect(ctx, on, extra, 0.4f), COREINFER_INVALID,
                          std::to_string(extra) + " names a statistic");
        }
    }
    decode(loaded.llama.get(), { 1, 2 });
    check_statistics(ctx, loaded.seen, 100);
    for (float share : { 0.0f, -0.0f, FLT_TRUE_MIN, 1.0f }) {
        CHECK(coreinfer_stats_collect(ctx, true, top, share) == COREINFER_OK, coreinfer_last_error());
    }
}

TEST(a_file_cut_after_loading_is_an_error_and_decoding_goes_on_dense) {
    for (double part : { 0.9, 0.5, 0.01, 0.0 }) {
        Loaded              loaded(Shape(), /*use_mmap=*/false);
        coreinfer_context * ctx   = loaded.coreinf.get();
        llama_context_ptr   plain = make_context(loaded.model.get());
        CHECK(set_cores(ctx, { { 2, { 1, 2 }, {} } }) == COREINFER_OK);
        CHECK(coreinfer_core_use(ctx, true) == COREINFER_OK);
        decode(loaded.llama.get(), kPrompt);
        loaded.file.cut_to(part);

        // the same again needs nothing of the file
        CHECK(set_cores(ctx, { { 2, { 1, 2 }, {} } }) == COREINFER_OK);
        std::vector<float> norms(300);
        check_refused(coreinfer_down_norms(ctx, norms.data()), COREINFER_IO, loaded.file.path());
        check_refused(set_cores(ctx, { { 0, { 99 }, {} }, { 1, { 99 }, {} }, { 2, { 99 }, {} } }), COREINFER_IO,
                      loaded.file.path());

        CHECK(again(loaded.llama.get()) == again(plain.get()));
    }
}

TEST(down_norms_of_all_ffns_follow_each_other) {
    Loaded             loaded;
    std::vector<float> norms(301, -1.0f);
    CHECK(coreinfer_down_norms(loaded.coreinf.get(), norms.data()) == COREINFER_OK);
    CHECK(std::all_of(norms.begin(), norms.end() - 1, [](float norm) { return norm > 0.0f; }));
    CHECK(norms[300] == -1.0f);
}

//
// who goes first
//

TEST(everything_may_be_freed_in_any_order) {
    for (int order = 0; order < 4; ++order) {
        Loaded loaded;
        CHECK(set_cores(loaded.coreinf.get(), { { 0, { 1, 2, 3 }, std::vector<float>(100, 0.1f) } }) == COREINFER_OK);
        CHECK(coreinfer_core_use(loaded.coreinf.get(), true) == COREINFER_OK);
        CHECK(collect(loaded, kAll) == COREINFER_OK);
        if (order != 3) {
            decode(loaded.llama.get(), kPrompt);
        }
        if (order == 0) {
            loaded.coreinf.reset();
            decode(loaded.llama.get(), { 1 });
            loaded.llama.reset();
            loaded.model.reset();
        } else if (order == 1) {
            loaded.llama.reset();
            loaded.coreinf.reset();
            loaded.model.reset();
        } else {
            loaded.llama.reset();
            loaded.model.reset();
            loaded.coreinf.reset();
        }
    }
    coreinfer_free(nullptr);
}

// Every call that needs the llama_context fails, and none crashes.
static void check_detached(coreinfer_context * ctx) {
    coreinfer_ffn      ffn;
    coreinfer_stats    stats = {};
    std::vector<float> values(300);
    const std::string  part = "llama_context has been freed";
    check_refused(coreinfer_ffn_get(ctx, 0, &ffn), COREINFER_INVALID, part);
    check_refused(collect(ctx, kAll), COREINFER_INVALID, part);
    check_refused(coreinfer_stats_collect(ctx, false, 0, 0.0f), COREINFER_INVALID, part);
    check_refused(coreinfer_stats_clear(ctx), COREINFER_INVALID, part);
    check_refused(coreinfer_stats_get(ctx, 0, &stats), COREINFER_INVALID, part);
    check_refused(coreinfer_down_norms(ctx, values.data()), COREINFER_INVALID, part);
    check_refused(set_cores(ctx, { { 0, { 1 }, {} } }), COREINFER_INVALID, part);
    check_refused(coreinfer_core_use(ctx, true), COREINFER_INVALID, part);
    check_refused(coreinfer_core_use(ctx, false), COREINFER_INVALID, part);
    CHECK(coreinfer_core_bytes(ctx) == 0);
}

TEST(calls_after_the_llama_context_is_freed_fail) {
    Loaded loaded;
    CHECK(set_cores(loaded.coreinf.get(), { { 0, { 1, 2, 3 }, {} } }) == COREINFER_OK);
    loaded.llama.reset();
    check_detached(loaded.coreinf.get());
    loaded.model.reset();
    check_detached(loaded.coreinf.get());
}

TEST(the_last_attached_to_a_llama_context_is_in_force) {
    for (bool first_freed_first : { true, false }) {
        Loaded                     loaded;
        Activations                masked;
        llama_context_ptr          dense = make_context(loaded.model.get(), Activations::evaluated, &masked);
        const std::vector<CoreSet> other = { { 0, { 7 }, {} } };
        const std::vector<CoreSet> sets  = { { 0, { 1, 50 }, {} }, { 2, { 1, 2, 3 }, {} } };
        CHECK(set_cores(loaded.coreinf.get(), other) == COREINFER_OK);
        CHECK(coreinfer_core_use(loaded.coreinf.get(), true) == COREINFER_OK);
        mask(masked, other, 100);
        CHECK(difference(decode(loaded.llama.get(), { 3 }), decode(dense.get(), { 3 })) <= 1e-4f);

        coreinfer_ptr second = attach(loaded.llama.get(), loaded.file.path());
        check_detached(loaded.coreinf.get());
        mask(masked, {}, 100);
        CHECK(difference(decode(loaded.llama.get(), { 3 }), decode(dense.get(), { 3 })) <= 1e-5f);
        CHECK(set_cores(second.get(), sets) == COREINFER_OK);
        CHECK(coreinfer_core_use(second.get(), true) == COREINFER_OK);
        mask(masked, sets, 100);
        CHECK(difference(decode(loaded.llama.get(), { 4 }), decode(dense.get(), { 4 })) <= 1e-4f);
        if (first_freed_first) {
            loaded.coreinf.reset();
            CHECK(difference(decode(loaded.llama.get(), { 5 }), decode(dense.get(), { 5 })) <= 1e-4f);
            loaded.llama.reset();
            check_detached(second.get());
        } else {
            second.reset();
            mask(masked, {}, 100);
            CHECK(difference(decode(loaded.llama.get(), { 5 }), decode(dense.get(), { 5 })) <= 1e-5f);
            loaded.llama.reset();
            check_detached(loaded.coreinf.get());
        }
    }
}

TEST(attaching_and_detaching_again_and_again_leaves_nothing_behind) {
    Loaded            loaded;
    llama_context_ptr plain = make_context(loaded.model.get());
    for (llama_token token = 0; token < 10; ++token) {
        loaded.coreinf.reset();
        loaded.coreinf = attach(loaded.llama.get(), loaded.file.path());
        CHECK(set_cores(loaded.coreinf.get(), { { 1, { token, token + 1 }, {} } }) == COREINFER_OK);
        CHECK(decode(loaded.llama.get(), { token }) == decode(plain.get(), { token }));
    }
}

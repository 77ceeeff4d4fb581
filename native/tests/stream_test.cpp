// Models whose FFN weights are in no memory: what is evaluated, and what happens to the file meanwhile.

#include "check.h"
#include "coreinfer.h"
#include "error.h"
#include "ggml-backend.h"
#include "model.h"
#include "row_lookup.h"
#include "tensor_file.h"
#include "unread_buffer.h"

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <thread>
#include <utility>

#ifdef __linux__

using namespace test;

namespace {

// Types with and without a layout of their own, widths that leave a short last chunk, several chunks a weight.
Shape mixed_shape() {
    Shape shape;
    shape.n_embd = 256;
    shape.n_ff   = 7968;
    shape.layers = { GGML_TYPE_Q4_0, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_F16, GGML_TYPE_Q5_1, GGML_TYPE_Q4_0 };
    return shape;
}

std::vector<llama_token> tokens(int32_t n, uint32_t seed) {
    Random                   random(seed);
    std::vector<llama_token> result(n);
    for (llama_token & token : result) {
        token = random.below(50);
    }
    return result;
}

// A model with its weights in the file, and the same one in memory.
struct Pair {
    TempFile          file;
    llama_model_ptr   whole;
    llama_context_ptr whole_context;
    coreinfer_ptr     whole_core;
    llama_model_ptr   streamed;
    llama_context_ptr context;
    coreinfer_ptr     core;

    explicit Pair(const Shape & shape, int32_t n_threads = 2, bool packed = false) {
        write_model(file.path(), shape, 1);
        whole         = load_model(file.path(), false);
        whole_context = make_context(whole.get(), nullptr, nullptr, n_threads);
        whole_core    = attach(whole_context.get(), file.path(), 2, packed);
        streamed      = load_streamed(file.path());
        context       = make_context(streamed.get(), nullptr, nullptr, n_threads);
        core          = attach(context.get(), file.path(), 2, packed);
    }

    int32_t decode_status(std::vector<llama_token> batch) const {
        return llama_decode(context.get(), llama_batch_get_one(batch.data(), static_cast<int32_t>(batch.size())));
    }

    // The embeddings of these tokens are in memory from now on, and reading them cannot fail.
    void hold_rows(const std::vector<llama_token> & rows) const {
        CHECK(decode_status(rows) == 0);
        CHECK(coreinfer_stream_end(core.get(), nullptr) == COREINFER_OK, coreinfer_last_error());
    }
};

int32_t n_passes(size_t n_tokens) {
    return static_cast<int32_t>((n_tokens + 15) / 16); // n_ubatch of make_context
}

void check_same(const std::vector<float> & a, const std::vector<float> & b) {
    CHECK(a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

std::vector<float> sums_of(coreinfer_context * core, int32_t ffn) {
    coreinfer_ffn about = {};
    CHECK(coreinfer_ffn_get(core, ffn, &about) == COREINFER_OK);
    std::vector<float> sums(about.n_ff);
    coreinfer_stats    stats = {};
    stats.sum_sq             = sums.data();
    CHECK(coreinfer_stats_get(core, ffn, &stats) == COREINFER_OK);
    return sums;
}

} // namespace

TEST(streamed_weights_give_the_same_logits_and_statistics) {
    for (int32_t n_threads : { 1, 2, 3 }) {
        const Pair pair(mixed_shape(), n_threads);
        CHECK(coreinfer_stats_collect(pair.core.get(), true, 0, 0.0f) == COREINFER_OK);
        CHECK(coreinfer_stats_collect(pair.whole_core.get(), true, 0, 0.0f) == COREINFER_OK);
        const auto prompt = tokens(40, 2);
        CHECK(coreinfer_stream_begin(pair.core.get(), n_passes(prompt.size())) == COREINFER_OK);
        check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
        coreinfer_stream read = {};
        CHECK(coreinfer_stream_end(pair.core.get(), &read) == COREINFER_OK, coreinfer_last_error());
        uint64_t n_bytes = 0;
        for (int32_t i = 0; i < coreinfer_n_ffn(pair.core.get()); ++i) {
            check_same(sums_of(pair.core.get(), i), sums_of(pair.whole_core.get(), i));
            coreinfer_ffn ffn = {};
            CHECK(coreinfer_ffn_get(pair.core.get(), i, &ffn) == COREINFER_OK);
            n_bytes += ffn.n_bytes - (2 * ffn.n_ff + ffn.n_out) * sizeof(float); // less the biases
        }
        // the last FFN is not evaluated where no logits are asked for
        CHECK(read.n_bytes > 2 * n_bytes && read.n_bytes <= 3 * n_bytes,
              std::to_string(read.n_bytes) + " " + std::to_string(n_bytes));
    }
}

TEST(evaluating_without_announcing_it_streams_as_well) {
    const Pair pair(mixed_shape());
    const auto prompt = tokens(40, 3);
    check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
    // and after fewer evaluations than were announced
    CHECK(coreinfer_stream_begin(pair.core.get(), 7) == COREINFER_OK);
    check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
    check_same(decode(pair.context.get(), { 1 }), decode(pair.whole_context.get(), { 1 }));
}

TEST(any_amount_of_reading_ahead_gives_the_same_logits) {
    const Pair pair(mixed_shape());
    for (uint64_t n_bytes : { uint64_t(0), uint64_t(12) << 20, uint64_t(1) << 40 }) {
        CHECK(coreinfer_stream_ahead(pair.core.get(), n_bytes) == COREINFER_OK);
        CHECK(coreinfer_stream_begin(pair.core.get(), 1) == COREINFER_OK);
        check_same(decode(pair.context.get(), { 5, 6, 7 }), decode(pair.whole_context.get(), { 5, 6, 7 }));
        CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
    }
}

TEST(a_core_set_of_a_streamed_model_gives_the_same_logits) {
    const Pair pair(mixed_shape());
    Random     random(4);
    // layer 1 is not named: dense, and so to be held as a whole
    std::vector<std::vector<int32_t>> neurons;
    std::vector<float>                fill = random.floats(7968, 0.1f);
    std::vector<coreinfer_core>       cores;
    for (int32_t i : { 0, 2, 3, 4, 5 }) {
        neurons.push_back(random.neurons(1000 + 37 * i, 7968));
        cores.push_back(
            { i, static_cast<int32_t>(neurons.back().size()), nullptr, i % 2 ? fill.data() : nullptr, nullptr });
    }
    for (size_t i = 0; i < cores.size(); ++i) {
        cores[i].neurons = neurons[i].data();
    }
    for (coreinfer_context * core : { pair.core.get(), pair.whole_core.get() }) {
        CHECK(coreinfer_core_set(core, cores.data(), static_cast<int32_t>(cores.size())) == COREINFER_OK);
        CHECK(coreinfer_core_use(core, true) == COREINFER_OK);
    }
    const auto prompt = tokens(20, 5);
    check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
    CHECK(coreinfer_core_bytes(pair.core.get()) == coreinfer_core_bytes(pair.whole_core.get()));

    // a second turn: the core set goes, the weights are streamed, and another comes
    for (coreinfer_context * core : { pair.core.get(), pair.whole_core.get() }) {
        CHECK(coreinfer_core_set(core, nullptr, 0) == COREINFER_OK);
        CHECK(coreinfer_core_use(core, false) == COREINFER_OK);
    }
    CHECK(coreinfer_stream_begin(pair.core.get(), n_passes(prompt.size())) == COREINFER_OK);
    check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
    for (coreinfer_context * core : { pair.core.get(), pair.whole_core.get() }) {
        CHECK(coreinfer_core_set(core, cores.data(), 2) == COREINFER_OK);
        CHECK(coreinfer_core_use(core, true) == COREINFER_OK);
    }
    check_same(decode(pair.context.get(), { 9 }), decode(pair.whole_context.get(), { 9 }));
}

TEST(levels_that_are_set_before_anything_is_evaluated_need_no_streaming) {
    coreinfer_load_packed(false, false); // makes our layout known
    Shape shape  = mixed_shape();
    shape.n_ff   = 288;
    shape.layers = { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1 };
    const Pair    pair(shape, 2, true);
    coreinfer_ffn ffn = {};
    CHECK(coreinfer_ffn_get(pair.core.get(), 0, &ffn) == COREINFER_OK);
    if (ffn.neuron_bytes[COREINFER_LEVEL_2_BITS] == 0.0f) {
        return; // levels need our kernels
    }
    Random                            random(6);
    const std::vector<float>          fill = random.floats(288, 0.1f);
    std::vector<std::vector<int32_t>> neurons;
    std::vector<std::vector<uint8_t>> levels;
    std::vector<coreinfer_core>       cores;
    for (int32_t i : { 0, 1, 2 }) {
        neurons.push_back(random.neurons(i == 2 ? 288 : 101 + 50 * i, 288));
        levels.emplace_back();
        for (size_t j = 0; j < neurons.back().size(); ++j) {
            levels.back().push_back(static_cast<uint8_t>(i == 2 ? 2 : random.below(3)));
        }
    }
    for (int32_t i : { 0, 1, 2 }) {
        cores.push_back(
            { i, static_cast<int32_t>(neurons[i].size()), neurons[i].data(), fill.data(), levels[i].data() });
    }
    for (coreinfer_context * core : { pair.core.get(), pair.whole_core.get() }) {
        CHECK(coreinfer_core_set(core, cores.data(), 3) == COREINFER_OK, coreinfer_last_error());
        CHECK(coreinfer_core_use(core, true) == COREINFER_OK);
    }
    const auto prompt = tokens(40, 7);
    check_same(decode(pair.context.get(), prompt), decode(pair.whole_context.get(), prompt));
    check_same(decode(pair.context.get(), { 9 }), decode(pair.whole_context.get(), { 9 }));
    coreinfer_stream read = {};
    CHECK(coreinfer_stream_end(pair.core.get(), &read) == COREINFER_OK);
    CHECK(read.n_bytes == 0);
}

TEST(more_rows_of_the_embedding_are_looked_up_than_stay_in_memory) {
    Shape shape;
    shape.n_vocab = 3000;
    const Pair pair(shape);
    Random     random(6);
    for (int i = 0; i < 60; ++i) {
        std::vector<llama_token> batch(64);
        for (llama_token & token : batch) {
            token = random.below(3000);
        }
        check_same(decode(pair.context.get(), batch), decode(pair.whole_context.get(), batch));
        llama_memory_clear(llama_get_memory(pair.context.get()), true);
        llama_memory_clear(llama_get_memory(pair.whole_context.get()), true);
    }
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
}

TEST(rows_that_were_looked_up_stay_until_there_are_too_many) {
    const int64_t              n_row = 40, n_rows = 2000;
    const std::vector<uint8_t> data = as_bytes(Random(7).floats(n_row * n_rows, 1.0f));
    const TempFile             path;
    std::ofstream(path.path(), std::ios::binary)
        .write(reinterpret_cast<const char *>(data.data()), static_cast<std::streamsize>(data.size()));
    const coreinfer::File  file(path.path());
    const ggml_context_ptr meta(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    ggml_tensor *          matrix = ggml_new_tensor_2d(meta.get(), GGML_TYPE_F32, n_row, n_rows);

    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), coreinfer::unread_buffer_type()));
    CHECK(buffer);
    const coreinfer::FileTensor at = { &file, 0, GGML_TYPE_F32, data.size() };
    coreinfer::RowLookup        lookup(matrix, at);
    bool                        refused = false;
    try {
        coreinfer::RowLookup another(matrix, at);
    } catch (const coreinfer::Error & error) {
        refused = error.status == COREINFER_INVALID;
    }
    CHECK(refused);

    const auto fetch = [&](int32_t first, int32_t n) {
        std::vector<int32_t> rows(n);
        std::iota(rows.begin(), rows.end(), first);
        rows.push_back(first); // twice
        lookup.fetch(rows.data(), static_cast<int64_t>(rows.size()));
        const size_t offset = first * matrix->nb[1];
        CHECK(std::memcmp(static_cast<uint8_t *>(matrix->data) + offset, data.data() + offset, n * matrix->nb[1]) == 0);
        return lookup.n_held();
    };
    CHECK(fetch(0, 600) == 600); // as many as are needed at once
    CHECK(fetch(10, 500) == 600);
    CHECK(fetch(700, 1) == 1);
    CHECK(fetch(800, 511) == 512);
    CHECK(fetch(1999, 1) == 1);
    CHECK(!lookup.failed() && !lookup.take_error());
    path.cut(1000);
    const int32_t row = 500;
    lookup.fetch(&row, 1);
    CHECK(lookup.failed());
    CHECK(lookup.take_error().value().status == COREINFER_IO);
    CHECK(!lookup.failed() && !lookup.take_error());
}

TEST(rows_of_the_embedding_that_cannot_be_read_abort_decoding_with_the_core_set) {
    const Pair                        pair(mixed_shape());
    const std::vector<int32_t>        neurons = { 1, 2, 3 };
    const std::vector<coreinfer_core> cores   = { { 0, 3, neurons.data(), nullptr, nullptr } };
    CHECK(coreinfer_core_set(pair.core.get(), cores.data(), 1) == COREINFER_OK);
    CHECK(coreinfer_core_use(pair.core.get(), true) == COREINFER_OK);
    CHECK(pair.decode_status({ 1 }) == 0);
    pair.file.cut_to(0.01);
    CHECK(pair.decode_status({ 1 }) == 0); // it is there already
    CHECK(pair.decode_status({ 2 }) == 2);
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_IO);
    CHECK(std::strstr(coreinfer_last_error(), "cut"), coreinfer_last_error());
}

TEST(norms_of_streamed_down_weights_come_from_the_file) {
    const Pair         pair(mixed_shape());
    std::vector<float> streamed(7968 * 6), whole(7968 * 6);
    CHECK(coreinfer_down_norms(pair.core.get(), streamed.data()) == COREINFER_OK);
    CHECK(coreinfer_down_norms(pair.whole_core.get(), whole.data()) == COREINFER_OK);
    check_same(streamed, whole);
}

TEST(a_file_that_is_cut_aborts_evaluating_and_says_why) {
    const Pair pair(mixed_shape());
    pair.hold_rows({ 1, 2, 3 });
    pair.file.cut_to(0.6);
    CHECK(coreinfer_stream_begin(pair.core.get(), 1) == COREINFER_OK);
    CHECK(pair.decode_status({ 1, 2, 3 }) == 2);
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_IO);
    CHECK(std::strstr(coreinfer_last_error(), "cut") && std::strstr(coreinfer_last_error(), pair.file.path()),
          coreinfer_last_error());
    // and so each time
    CHECK(coreinfer_stream_begin(pair.core.get(), 1) == COREINFER_OK);
    CHECK(pair.decode_status({ 1, 2, 3 }) == 2);
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_IO);
}

TEST(a_file_that_is_cut_between_two_evaluations_is_noticed) {
    const Pair pair(mixed_shape());
    CHECK(coreinfer_stream_begin(pair.core.get(), 5) == COREINFER_OK);
    check_same(decode(pair.context.get(), { 1, 2, 3 }), decode(pair.whole_context.get(), { 1, 2, 3 }));
    std::this_thread::sleep_for(std::chrono::milliseconds(200)); // what is read ahead by now is good
    pair.file.cut_to(0.3);
    int32_t status = 0;
    for (int i = 0; i < 4 && status == 0; ++i) {
        status = pair.decode_status({ 1, 2, 3 });
    }
    CHECK(status == 2);
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_IO);
}

TEST(a_file_that_is_written_to_is_noticed) {
    const Pair pair(mixed_shape());
    pair.hold_rows({ 1 });
    std::filesystem::last_write_time(pair.file.path(),
                                     std::filesystem::last_write_time(pair.file.path()) + std::chrono::seconds(1));
    CHECK(coreinfer_stream_begin(pair.core.get(), 1) == COREINFER_OK);
    CHECK(pair.decode_status({ 1 }) == 2);
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_IO);
    CHECK(std::strstr(coreinfer_last_error(), "written to"), coreinfer_last_error());
    const std::vector<int32_t> neurons = { 1, 2, 3 };
    const coreinfer_core       core    = { 0, 3, neurons.data(), nullptr, nullptr };
    CHECK(coreinfer_core_set(pair.core.get(), &core, 1) == COREINFER_IO);
    CHECK(std::strstr(coreinfer_last_error(), "written to"), coreinfer_last_error());
}

TEST(a_file_that_is_replaced_is_still_read_as_it_was) {
    const Pair     pair(mixed_shape());
    const TempFile other;
    write_model(other.path(), mixed_shape(), 99);
    std::filesystem::rename(other.path(), pair.file.path());
    check_same(decode(pair.context.get(), { 1, 2, 3 }), decode(pair.whole_context.get(), { 1, 2, 3 }));
    CHECK(coreinfer_stream_end(pair.core.get(), nullptr) == COREINFER_OK);
}

TEST(freeing_while_weights_are_read_ahead_waits_for_the_reader) {
    for (int i = 0; i < 5; ++i) {
        const Pair pair(mixed_shape());
        CHECK(coreinfer_stream_begin(pair.core.get(), 100) == COREINFER_OK);
        if (i % 2) {
            decode(pair.context.get(), { 1, 2, 3 });
        }
    }
}

TEST(a_model_with_only_a_part_of_what_is_streamed_in_memory_is_refused) {
    const TempFile file;
    write_model(file.path(), mixed_shape(), 1);
    for (const auto & [pattern, reason] : { std::pair("ffn_up\\.weight", "a part of the weights of its FFN"),
                                            std::pair("blk\\.0\\.ffn_(up|gate|down)\\.weight", "of some FFNs"),
                                            std::pair("token_embd\\.weight", "the embedding is not in memory") }) {
        const llama_model_ptr   model   = load_streamed(file.path(), pattern);
        const llama_context_ptr context = make_context(model.get());
        coreinfer_context *     core    = nullptr;
        const char *            path    = file.path();
        const coreinfer_status  status  = coreinfer_new(context.get(), &path, 1, 1, false, &core);
        coreinfer_free(core);
        CHECK(status == COREINFER_INVALID && std::strstr(coreinfer_last_error(), reason), coreinfer_last_error());
    }
}

TEST(streaming_a_model_in_memory_is_refused) {
    const Pair pair(mixed_shape());
    CHECK(coreinfer_stream_begin(pair.whole_core.get(), 1) == COREINFER_INVALID);
    CHECK(coreinfer_stream_end(pair.whole_core.get(), nullptr) == COREINFER_INVALID);
    CHECK(coreinfer_stream_ahead(pair.whole_core.get(), 1) == COREINFER_INVALID);
    CHECK(coreinfer_stream_begin(pair.core.get(), 0) == COREINFER_INVALID);
}

#endif

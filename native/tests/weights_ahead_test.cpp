// Weights on their way to a device while it computes, on one whose queues run in any order that events allow.

#include "weights_ahead.h"

#include "check.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "pretend_device.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

using namespace coreinfer;

namespace {

constexpr int64_t kTokens = 32;
constexpr size_t  kMost   = 10000; // some weights are larger, others not

const std::vector<int64_t> kWidths = { 64, 96, 16, 64, 128, 32 };

bool copy(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * dst, const ggml_tensor * next,
          void * data) {
    return static_cast<WeightsAhead *>(data)->copy(backend, weights, dst, next);
}

// Products one after the other, with weights in main memory.
struct Chain {
    ggml_context_ptr           of_weights{ ggml_init({ ggml_tensor_overhead() * 8, nullptr, true }) };
    ggml_context_ptr           ctx{ ggml_init({ ggml_tensor_overhead() * 32 + ggml_graph_overhead(), nullptr, true }) };
    std::vector<ggml_tensor *> weights;
    ggml_backend_buffer_ptr    buffer;
    ggml_tensor *              input;
    ggml_tensor *              result;
    ggml_cgraph *              graph;
    std::vector<float>         values;

    Chain() : input(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, kWidths[0], kTokens)), result(input) {
        for (size_t i = 1; i < kWidths.size(); ++i) {
            weights.push_back(ggml_new_tensor_2d(of_weights.get(), GGML_TYPE_F32, kWidths[i - 1], kWidths[i]));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(of_weights.get(), ggml_backend_cpu_buffer_type()));
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        std::mt19937                    engine(7);
        std::normal_distribution<float> normal;
        const auto                      drawn = [&](const ggml_tensor * like) {
            std::vector<float> some(ggml_nelements(like));
            std::generate(some.begin(), some.end(), [&] { return normal(engine); });
            return some;
        };
        for (ggml_tensor * of : weights) {
            ggml_backend_tensor_set(of, drawn(of).data(), 0, ggml_nbytes(of));
            result = ggml_mul_mat(ctx.get(), of, result);
        }
        values = drawn(input);
        ggml_set_input(input);
        ggml_set_output(result);
        graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, result);
    }

    // What comes out where ahead copies, or with nullptr where the scheduler does.
    std::vector<float> run(WeightsAhead * ahead) {
        const ggml_backend_ptr device(ggml_backend_dev_init(test::pretend_device(), nullptr));
        const ggml_backend_ptr cpu(ggml_backend_cpu_init());
        ggml_backend_t         backends[] = { device.get(), cpu.get() };
        ggml_backend_sched_ptr sched(ggml_backend_sched_new(backends, nullptr, 2, 64, false, /*op_offload =*/true));
        if (ahead) {
            ggml_backend_sched_set_copy_callback(sched.get(), copy, ahead);
        }
        CHECK(ggml_backend_sched_alloc_graph(sched.get(), graph));
        std::vector<float> out(ggml_nelements(result));
        for (int pass = 0; pass < 2; ++pass) { // the second finds what the first has left
            ggml_backend_tensor_set(input, values.data(), 0, ggml_nbytes(input));
            CHECK(ggml_backend_sched_graph_compute(sched.get(), graph) == GGML_STATUS_SUCCESS);
            ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        }
        return out;
    }
};

} // namespace

TEST(products_have_their_weights_in_whatever_order_the_queues_run) {
    test::pretend_begin(0);
    const std::vector<float> wanted = Chain().run(nullptr);
    for (unsigned seed = 0; seed < 200; ++seed) {
        Chain        chain;
        WeightsAhead ahead({ chain.weights.begin(), chain.weights.end() }, kMost);
        test::pretend_begin(seed);
        CHECK(chain.run(&ahead) == wanted, "seed " + std::to_string(seed));
    }
}

TEST(all_weights_but_the_first_begin_to_cross_during_the_product_before) {
    Chain        chain;
    WeightsAhead ahead({ chain.weights.begin(), chain.weights.end() }, kMost);
    test::pretend_begin(1);
    chain.run(&ahead);
    size_t begun = 0;
    size_t all   = 0;
    for (const ggml_tensor * weights : chain.weights) {
        all += ggml_nbytes(weights);
        begun += weights == chain.weights.front() ? 0 : std::min(ggml_nbytes(weights), kMost);
    }
    CHECK(test::pretend_bytes() == (std::vector<size_t>{ 2 * (all - begun), 2 * begun }));
}

TEST(weights_that_are_not_named_are_left_to_the_scheduler) {
    test::pretend_begin(0);
    const std::vector<float> wanted = Chain().run(nullptr);
    Chain                    chain;
    WeightsAhead             ahead({ chain.weights[1], chain.weights[2] }, kMost);
    test::pretend_begin(2);
    CHECK(chain.run(&ahead) == wanted);
    CHECK(test::pretend_bytes().at(1) == 2 * std::min(ggml_nbytes(chain.weights[2]), kMost));
}

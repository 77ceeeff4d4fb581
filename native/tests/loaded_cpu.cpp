// The functions of ggml's CPU backend that the tests call, where the backend is a library that is loaded at run time
// (GGML_BACKEND_DL) and cannot be linked.

#ifdef GGML_BACKEND_DL

#    include "ggml-backend.h"
#    include "ggml-cpp.h"
#    include "ggml-cpu.h"

#    include <cstring>

static ggml_backend_reg_t cpu() {
    return ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

template <typename Function>
static Function function(const char * name) {
    return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(cpu(), name));
}

static int has(const char * name) {
    const auto features = function<ggml_backend_get_features_t>("ggml_backend_get_features");
    for (const ggml_backend_feature * feature = features(cpu()); feature->name; ++feature) {
        if (std::strcmp(feature->name, name) == 0) {
            return std::strcmp(feature->value, "0") != 0;
        }
    }
    return 0;
}

int ggml_cpu_has_avx2() {
    return has("AVX2");
}

int ggml_cpu_has_dotprod() {
    return has("DOTPROD");
}

ggml_backend_t ggml_backend_cpu_init() {
    return ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
}

void ggml_backend_cpu_set_n_threads(ggml_backend_t backend, int n_threads) {
    function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend, n_threads);
}

ggml_status ggml_graph_compute_with_ctx(ggml_context *, ggml_cgraph * graph, int n_threads) {
    const ggml_backend_ptr backend(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    return ggml_backend_graph_compute(backend.get(), graph);
}

#endif

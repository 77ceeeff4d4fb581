#include "devices.h"

#include "error.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <string>

namespace coreinfer {

namespace {

// A function that the RPC backend has beside ggml's interface; nullptr if this build has no such backend.
template <typename Function>
Function rpc_function(const char * name) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    return rpc ? reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(rpc, name)) : nullptr;
}

// Whether they are one GPU, which two backends of one build have found.
bool are_same(ggml_backend_dev_t a, ggml_backend_dev_t b) {
    ggml_backend_dev_props of_a = {}, of_b = {};
    ggml_backend_dev_get_props(a, &of_a);
    ggml_backend_dev_get_props(b, &of_b);
    return of_a.device_id && of_b.device_id && std::strcmp(of_a.device_id, of_b.device_id) == 0;
}

} // namespace

// In llama.cpp's order (llama_prepare_model_devices), without those that it passes over.
std::vector<ggml_backend_dev_t> devices() {
    std::vector<ggml_backend_dev_t> servers, gpus, integrated;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t               device  = ggml_backend_dev_get(i);
        const enum ggml_backend_dev_type type    = ggml_backend_dev_type(device);
        ggml_backend_reg_t               backend = ggml_backend_dev_backend_reg(device);
        if (type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            if (integrated.empty() || ggml_backend_dev_backend_reg(integrated.back()) == backend) {
                integrated.push_back(device);
            }
        } else if (type == GGML_BACKEND_DEVICE_TYPE_GPU) {
            if (std::string(ggml_backend_reg_name(backend)) == "RPC") {
                servers.push_back(device);
            } else if (std::none_of(gpus.begin(), gpus.end(),
                                    [device](ggml_backend_dev_t gpu) { return are_same(gpu, device); })) {
                gpus.push_back(device);
            }
        }
    }
    const std::vector<ggml_backend_dev_t> & local = gpus.empty() ? integrated : gpus;
    servers.insert(servers.end(), local.begin(), local.end());
    return servers;
}

int32_t number_of_device(ggml_backend_buffer_type_t type) {
    if (ggml_backend_buft_is_host(type)) {
        return -1;
    }
    const std::vector<ggml_backend_dev_t> all   = devices();
    const auto                            found = std::find(all.begin(), all.end(), ggml_backend_buft_get_device(type));
    return found == all.end() ? -1 : static_cast<int32_t>(std::distance(all.begin(), found));
}

void add_rpc_server(const char * endpoint) {
    const auto add = rpc_function<ggml_backend_reg_t (*)(const char *)>("ggml_backend_rpc_add_server");
    if (!endpoint || !add) {
        throw Error(COREINFER_UNSUPPORTED, "this build has no RPC backend (GGML_RPC), or there is no address");
    }
    ggml_backend_reg_t server = nullptr;
    try {
        server = add(endpoint);
    } catch (const std::exception & error) {
        throw Error(COREINFER_IO, error.what());
    }
    if (!server || ggml_backend_reg_dev_count(server) == 0) {
        throw Error(COREINFER_IO, std::string("the RPC server ") + endpoint + " has no device");
    }
    ggml_backend_register(server);
}

bool copies_ahead(ggml_backend_dev_t device) {
    // others that have events were not tried
    return std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device))) == "CUDA";
}

bool rpc_lost() {
    const auto lost = rpc_function<bool (*)()>("ggml_backend_rpc_lost");
    return lost && lost();
}

} // namespace coreinfer

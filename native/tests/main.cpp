// Runs the tests of the sources named as arguments (quant, gather, ...), or all of them.

#include "check.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

struct Test {
    std::string part; // the name of its source, without _test.cpp
    std::string name;
    void (*run)();
};

std::vector<Test> & tests() {
    static std::vector<Test> list;
    return list;
}

bool run(const Test & test) {
    const auto start   = std::chrono::steady_clock::now();
    const auto seconds = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    std::printf("%s: %s", test.part.c_str(), test.name.c_str());
    std::fflush(stdout);
    try {
        test.run();
    } catch (const std::exception & error) {
        std::printf(" FAILED\n    %s\n", error.what());
        return false;
    }
    std::printf(" (%.2f s)\n", seconds());
    return true;
}

} // namespace

test::Registration::Registration(const char * file, const char * name, void (*run)()) {
    std::string part  = file;
    part              = part.substr(part.find_last_of("/\\") + 1);
    std::string words = name;
    std::replace(words.begin(), words.end(), '_', ' ');
    tests().push_back({ part.substr(0, part.find("_test")), words, run });
}

int main(int argc, char ** argv) {
    const std::vector<std::string> parts(argv + 1, argv + argc);
    if (!std::getenv("COREINFER_TEST_LOG")) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    llama_backend_init();
    if (ggml_backend_reg_count() == 0) { // they are libraries of their own, beside this program
        ggml_backend_load_all();
    }
    int n_run    = 0;
    int n_failed = 0;
    for (const Test & test : tests()) {
        if (parts.empty() || std::find(parts.begin(), parts.end(), test.part) != parts.end()) {
            n_failed += run(test) ? 0 : 1;
            ++n_run;
        }
    }
    llama_backend_free();
    ggml_quantize_free();
    std::printf("%d tests, %d failed\n", n_run, n_failed);
    return n_failed || !n_run ? EXIT_FAILURE : EXIT_SUCCESS;
}

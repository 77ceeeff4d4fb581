#pragma once

// Tasks that run on several threads, each thread with memory of its own.

#include "tensor_file.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace coreinfer {

// Memory of one thread. Its tasks use it one after the other, because fresh pages cost more than the work in them.
struct Scratch {
    std::vector<uint8_t> chunk;   // bytes of the file
    std::vector<float>   weights; // a row of them
    std::vector<uint8_t> staging; // a compact tensor on its way into its buffer

    // A buffer to fetch n bytes into.
    uint8_t * room(size_t n) { return File::room(chunk, n); }

    template <typename T>
    static T * at_least(std::vector<T> & memory, size_t n) {
        if (memory.size() < n) {
            memory.resize(n);
        }
        return memory.data();
    }
};

// Run task(i, scratch) for i from 0 to n - 1 on n_threads threads. After an exception no further task starts, and the
// first exception is thrown.
inline void run_parallel(size_t n, int n_threads, const std::function<void(size_t, Scratch &)> & task) {
    std::atomic<size_t> next(0);
    std::exception_ptr  failure;
    std::mutex          mutex;

    const auto work = [&] {
        Scratch scratch;
        for (size_t i; (i = next++) < n;) {
            try {
                task(i, scratch);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!failure) {
                    failure = std::current_exception();
                }
                next = n;
            }
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(n);
    for (size_t i = 1; i < std::min<size_t>(std::max(n_threads, 1), n); ++i) {
        try {
            threads.emplace_back(work);
        } catch (const std::exception &) {
            break; // as many as the system gives
        }
    }
    work();
    for (std::thread & thread : threads) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

} // namespace coreinfer

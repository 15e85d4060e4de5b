// How the tasks of a call are shared out to threads, each with scratch memory of its own.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "maps.h"

namespace {

struct Job {
    void (*task)(const void* kernel, i64 index, char* scratch);
    const void* kernel;
    i64 tasks;
    std::size_t scratch_bytes;
    std::array<i64, 9> layout;  // what the layout of the scratch follows from
    std::atomic<i64> next{0};
    std::atomic<bool> out_of_memory{false};
};

// A thread keeps its scratch from call to call: fresh pages cost more than the arithmetic of a small map.
constexpr std::size_t kKeptBytes = 8 << 20;  // the largest measured shape has 2.5 MB

struct Arena {
    char* memory = nullptr;
    std::size_t bytes = 0;
    std::array<i64, 9> layout{};

    ~Arena() { std::free(memory); }

    // Zeros, or what earlier tasks of the same layout left: the gaps and halos, which no task fills, are zeros.
    char* claim(const Job& job) {
        if (layout == job.layout) return memory;
        layout = {};
        if (bytes < job.scratch_bytes) {
            std::free(memory);
            bytes = round_up(job.scratch_bytes, 64);
            memory = static_cast<char*>(std::aligned_alloc(64, bytes));
            if (!memory) return bytes = 0, nullptr;
        }
        std::memset(memory, 0, job.scratch_bytes);
        layout = job.layout;
        return memory;
    }

    void trim() {
        if (bytes <= kKeptBytes) return;
        std::free(memory);
        memory = nullptr, bytes = 0, layout = {};
    }
};

inline void work(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    i64 index = job.next++;
    if (index >= job.tasks) return;
    static thread_local Arena arena;
    char* scratch = arena.claim(job);
    if (!scratch) job.out_of_memory = true;
    for (; scratch && index < job.tasks; index = job.next++) job.task(job.kernel, index, scratch);
    arena.trim();
}

// Torch's own OpenMP threads where they can be had, so that the two do not compete for cores; else threads of the call.
// The team always has torch's size: another size would make the runtime end threads and start them again.
inline bool run(Job& job, i64 threads, i64 parallel) {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    if (threads <= 1 || job.tasks <= 1) {
        work(&job);
    } else if (parallel) {
        reinterpret_cast<Parallel>(parallel)(work, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> helpers;
        try {
            for (i64 i = 1; i < std::min(threads, job.tasks); ++i) helpers.emplace_back(work, &job);
        } catch (const std::system_error&) {  // no more threads to be had: go on with those that started
        }
        work(&job);
        for (std::thread& helper : helpers) helper.join();
    }
    return !job.out_of_memory;
}

}  // namespace

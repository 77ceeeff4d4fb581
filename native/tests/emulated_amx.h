#pragma once

// AMX in software, for tests on processors without it: COREINFER_EMULATE_AMX includes this before ggml's sources
// for AMX. Everything else in them runs as it is, which needs AVX-512 VNNI. Tiles are as in Intel's manual: a
// configuration, or a tile, that a processor would fault on ends the process.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef __AVX512VNNI__
#    error "an emulated AMX needs a processor with AVX-512 VNNI"
#endif

#ifndef __AMX_INT8__
#    define __AMX_INT8__ 1
#endif

namespace emulated_amx {

struct Tile {
    int     rows      = 0;
    int     row_bytes = 0;
    uint8_t bytes[16][64];
};

inline thread_local Tile tiles[8];

[[noreturn]] inline void fault(const char * what) {
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

inline Tile & tile(int n) {
    if (tiles[n].rows == 0) {
        fault("this thread has not configured the tile");
    }
    return tiles[n];
}

inline void load_config(const void * config) {
    uint8_t bytes[64];
    std::memcpy(bytes, config, sizeof(bytes));
    bool good = bytes[0] == 1 && bytes[1] == 0;
    for (int i = 2; i < 16; ++i) {
        good = good && bytes[i] == 0;
    }
    for (int i = 0; i < 16; ++i) {
        const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
        const int rows      = bytes[48 + i];
        good = good && rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0) && (i < 8 || rows == 0);
        if (i < 8) {
            tiles[i].rows      = rows;
            tiles[i].row_bytes = row_bytes;
            std::memset(tiles[i].bytes, 0, sizeof(tiles[i].bytes));
        }
    }
    if (!good) {
        fault("ldtilecfg with a configuration that is not valid");
    }
}

inline void zero(int n) {
    Tile & to = tile(n);
    std::memset(to.bytes, 0, sizeof(to.bytes));
}

inline void load(int n, const void * base, size_t stride) {
    Tile & to = tile(n);
    std::memset(to.bytes, 0, sizeof(to.bytes));
    for (int row = 0; row < to.rows; ++row) {
        std::memcpy(to.bytes[row], static_cast<const uint8_t *>(base) + row * stride, to.row_bytes);
    }
}

inline void store(int n, void * base, size_t stride) {
    const Tile & from = tile(n);
    for (int row = 0; row < from.rows; ++row) {
        std::memcpy(static_cast<uint8_t *>(base) + row * stride, from.bytes[row], from.row_bytes);
    }
}

// c [m, n] += a [m, 4 k] * b [k, n, 4], with 8 bits of type A and B
template <typename A, typename B>
void multiply(int n_c, int n_a, int n_b) {
    Tile &       c = tile(n_c);
    const Tile & a = tile(n_a);
    const Tile & b = tile(n_b);
    if (a.rows != c.rows || b.row_bytes != c.row_bytes || a.row_bytes != 4 * b.rows || c.row_bytes % 4 != 0) {
        fault("a product of tiles whose shapes do not fit");
    }
    for (int m = 0; m < c.rows; ++m) {
        int32_t sums[16];
        std::memcpy(sums, c.bytes[m], sizeof(sums));
        for (int k = 0; k < b.rows; ++k) {
            for (int n = 0; n < c.row_bytes / 4; ++n) {
                for (int i = 0; i < 4; ++i) {
                    sums[n] += static_cast<A>(a.bytes[m][4 * k + i]) * static_cast<B>(b.bytes[k][4 * n + i]);
                }
            }
        }
        std::memcpy(c.bytes[m], sums, sizeof(sums));
    }
}

} // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(config) emulated_amx::load_config(config)
#define _tile_zero(n) emulated_amx::zero(n)
#define _tile_loadd(n, base, stride) emulated_amx::load(n, base, stride)
#define _tile_stored(n, base, stride) emulated_amx::store(n, base, stride)
#define _tile_dpbssd(c, a, b) emulated_amx::multiply<int8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) emulated_amx::multiply<int8_t, uint8_t>(c, a, b)
#define _tile_dpbusd(c, a, b) emulated_amx::multiply<uint8_t, int8_t>(c, a, b)
#define _tile_dpbuud(c, a, b) emulated_amx::multiply<uint8_t, uint8_t>(c, a, b)

// What asks the system for the tiles is told that it has them.
#define syscall(...) 0L

// The tile configuration that mmq.cpp gives to ldtilecfg, as this compiler builds it.
//
// mmq.cpp is compiled in here with the flags of a build for AMX. A processor without AMX stops at ldtilecfg with
// SIGILL, and one that refuses a wrong configuration with SIGSEGV: the handler then reads the operand of the
// instruction. A processor that takes the configuration gives it back with sttilecfg.

#include "ggml-cpu/amx/mmq.cpp"

#include <cstdio>

constexpr int kSkipped = 77; // SKIP_RETURN_CODE

#if !defined(__AMX_INT8__) || !defined(__AVX512VNNI__)

// clang before 16 names the macro otherwise
int main() {
    std::printf("skipped: with this compiler ggml is built without its code for AMX\n");
    return kSkipped;
}

#else

#    include <ucontext.h>
#    include <csetjmp>
#    include <csignal>
#    include <cstring>

namespace {

enum Stop { kAtLoad = 1, kElsewhere = 2 };

sigjmp_buf            stopped;
volatile sig_atomic_t stop_signal = 0;
unsigned char         loaded[64];

static_assert(sizeof(tile_config_t) == sizeof(loaded), "ldtilecfg reads 64 bytes");

int32_t displacement(const uint8_t * at, int n_bytes) {
    if (n_bytes == 1) {
        return static_cast<int8_t>(*at);
    }
    int32_t value = 0;
    std::memcpy(&value, at, static_cast<size_t>(n_bytes));
    return value;
}

// The address of the memory operand if the processor stands at ldtilecfg (VEX.128.NP.0F38.W0 49 /0), else null.
const void * ldtilecfg_operand(const greg_t * registers) {
    static constexpr int kRegisters[] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                          REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    const auto           value        = [&](int n) { return static_cast<uint64_t>(registers[kRegisters[n]]); };

    const auto * code = reinterpret_cast<const uint8_t *>(registers[REG_RIP]);
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 0x02 || code[2] != 0x78 || code[3] != 0x49) {
        return nullptr;
    }
    const int       high_index = code[1] & 0x40 ? 0 : 8; // the prefix has these bits inverted
    const int       high_base  = code[1] & 0x20 ? 0 : 8;
    const int       mod        = code[4] >> 6;
    const int       base       = code[4] & 7;
    const uint8_t * rest       = code + 5;
    if (mod == 3 || (code[4] >> 3 & 7) != 0) {
        return nullptr;
    }
    uint64_t address = 0;
    int      n_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (base == 4) { // a scale, an index and a base
        const uint8_t sib   = *rest++;
        const int     index = (sib >> 3 & 7) + high_index;
        if ((sib & 7) == 5 && mod == 0) {
            n_bytes = 4;
        } else {
            address = value((sib & 7) + high_base);
        }
        address += index == 4 ? 0 : value(index) << (sib >> 6);
    } else if (base == 5 && mod == 0) { // relative to the next instruction
        n_bytes = 4;
        address = reinterpret_cast<uint64_t>(rest + n_bytes);
    } else {
        address = value(base + high_base);
    }
    return reinterpret_cast<const void *>(address + static_cast<uint64_t>(int64_t{ displacement(rest, n_bytes) }));
}

void on_signal(int signal, siginfo_t *, void * context) {
    stop_signal          = signal;
    const void * operand = ldtilecfg_operand(static_cast<ucontext_t *>(context)->uc_mcontext.gregs);
    if (operand) {
        std::memcpy(loaded, operand, sizeof(loaded));
    }
    siglongjmp(stopped, operand ? kAtLoad : kElsewhere);
}

__attribute__((noinline)) void configure() {
    ggml_tile_config_init();
}

bool has_vector_instructions() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Tiles 0 and 1 hold B, 2 and 3 A, 4 to 7 C: see the notes in mmq.cpp.
bool is_as_expected() {
    static constexpr int kRows[16]  = { 8, 8, 16, 16, 16, 16, 16, 16 };
    static constexpr int kColsb[16] = { 64, 64, 32, 32, 64, 64, 64, 64 };
    tile_config_t        config;
    std::memcpy(&config, loaded, sizeof(config));
    bool good = config.palette_id == 1 && config.start_row == 0;
    for (const uint8_t byte : config.reserved_0) {
        good = good && byte == 0;
    }
    std::printf("palette %d, start row %d; rows x bytes:", config.palette_id, config.start_row);
    for (int i = 0; i < 16; ++i) {
        good = good && config.rows[i] == kRows[i] && config.colsb[i] == kColsb[i];
        std::printf(" %dx%d", config.rows[i], config.colsb[i]);
    }
    std::printf("\n");
    return good;
}

} // namespace

int main() {
    if (!has_vector_instructions()) {
        std::printf("skipped: the code before ldtilecfg needs AVX-512\n");
        return kSkipped;
    }
    struct sigaction action = {};
    action.sa_sigaction     = on_signal;
    action.sa_flags         = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
    sigaction(SIGSEGV, &action, nullptr);

    // memory that the configuration comes to lie in is not zero by chance
    volatile unsigned char stack[4096];
    for (volatile unsigned char & byte : stack) {
        byte = 0xa5;
    }
    const int stop = sigsetjmp(stopped, 1);
    if (stop == 0) {
        configure();
        __asm__ volatile("sttilecfg %0" : "=m"(loaded));
        std::printf("the processor took the configuration\n");
    } else if (stop == kElsewhere) {
        std::printf("signal %d at an instruction that is not ldtilecfg\n", static_cast<int>(stop_signal));
        return stop_signal == SIGILL ? kSkipped : 1;
    } else {
        std::printf("signal %d at ldtilecfg\n", static_cast<int>(stop_signal));
    }
    if (!is_as_expected()) {
        std::printf("FAILED: this is not the configuration that ggml_tile_config_init sets\n");
        return 1;
    }
    return 0;
}

#endif

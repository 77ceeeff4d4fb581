// A plugin for qemu's user-mode emulators (7.0 and later): counts the instructions that a program executes, for
// bench_product on processors that are not at hand. The count stands in the first 8 bytes of the file that
// COUNT_INSTRUCTIONS names, which the program maps too.

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// What is used here of qemu-plugin.h, which distributions do not package.
struct qemu_plugin_tb;
struct qemu_info_t;
typedef void (*on_translation)(uint64_t id, struct qemu_plugin_tb * block);
void   qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, on_translation callback);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb * block);
void   qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb * block, int operation, void * count, uint64_t n);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t * count;

static void count_block(uint64_t id, struct qemu_plugin_tb * block) {
    (void) id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0 /* add */, count, qemu_plugin_tb_n_insns(block));
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const struct qemu_info_t * info, int argc,
                                                               char ** argv) {
    (void) info, (void) argc, (void) argv;
    const char * name = getenv("COUNT_INSTRUCTIONS");
    const int    file = name ? open(name, O_RDWR | O_CREAT, 0600) : -1;
    if (file < 0 || ftruncate(file, sizeof(*count)) != 0) {
        fprintf(stderr, "count_instructions: COUNT_INSTRUCTIONS must name a file that can be written\n");
        return 1;
    }
    count = mmap(NULL, sizeof(*count), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (count == MAP_FAILED) {
        return 1;
    }
    *count = 0;
    qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
    return 0;
}

#include "arena.h"

#include <stdlib.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace moeplan {
namespace {

constexpr int64_t LINE = 64;
constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int64_t KEPT = 128 << 20;  // a larger block is freed at the end of its call
constexpr int BLOCKS = 64;

// The first block is kept; a call that outgrows it takes further ones, which the next call replaces by one of the sum.
struct Arena {
    char* blocks[BLOCKS] = {};
    int64_t sizes[BLOCKS] = {};
    int count = 0;
    int64_t offset = 0, used = 0;

    ~Arena() { release(); }

    void release() {
        for (int i = 0; i < count; i++) free(blocks[i]);
        count = 0;
        offset = 0;
    }

    bool grow(int64_t bytes) {
        if (count == BLOCKS) return false;
        bytes = round_up(bytes, bytes >= HUGE_PAGE ? HUGE_PAGE : LINE);
        void* block = aligned_alloc(bytes >= HUGE_PAGE ? HUGE_PAGE : LINE, bytes);
        if (block == nullptr) return false;
        // Fewer page faults and address translations; only advice, so whether it is taken does not matter.
        if (bytes >= HUGE_PAGE) madvise(block, bytes, MADV_HUGEPAGE);
        blocks[count] = static_cast<char*>(block);
        sizes[count++] = bytes;
        offset = 0;
        return true;
    }
};

thread_local Arena arena;

}  // namespace

void arena_reset() {
    if (arena.count > 1) {
        arena.release();
        arena.grow(round_up(arena.used, HUGE_PAGE));
    }
    arena.offset = 0;
    arena.used = 0;
}

void* arena_take(int64_t bytes) {
    bytes = round_up(most(bytes, 1), LINE);
#ifdef __SANITIZE_ADDRESS__
    // A poisoned line after each piece: an overrun into the neighbour is reported.
    const int64_t redzone = LINE;
#else
    const int64_t redzone = 0;
#endif
    if (arena.count == 0 || arena.offset + bytes + redzone > arena.sizes[arena.count - 1]) {
        if (!arena.grow(most(bytes + redzone, arena.count ? arena.sizes[arena.count - 1] : 1 << 16))) return nullptr;
    }
    char* piece = arena.blocks[arena.count - 1] + arena.offset;
    arena.offset += bytes + redzone;
    arena.used += bytes + redzone;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(piece, bytes);
    ASAN_POISON_MEMORY_REGION(piece + bytes, redzone);
#endif
    return piece;
}

void arena_done() {
    int64_t held = 0;
    for (int i = 0; i < arena.count; i++) held += arena.sizes[i];
    if (held > KEPT) arena.release();
}

int64_t arena_used() { return arena.used; }

}  // namespace moeplan

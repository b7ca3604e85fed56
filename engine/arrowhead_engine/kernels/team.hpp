// SPDX-License-Identifier: Apache-2.0
// Threads that share the work of one call. Nobody waits for a thread that has not come yet: work is
// taken piece by piece, so a thread that sleeps or was put aside by the system costs only its share.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <immintrin.h>

#define RELAXED __ATOMIC_RELAXED
#define ACQUIRE __ATOMIC_ACQUIRE
#define RELEASE __ATOMIC_RELEASE
#define SEQ __ATOMIC_SEQ_CST

// A stretch of work in pieces, taken by whoever comes; on cache lines of its own.
struct alignas(64) Stretch {
    int next = 0;
    alignas(64) int done = 0;
};

// Between two looks at what another thread is about to write. It may have been put aside for long.
static inline void look_again(int& looks) {
    if (++looks < 2000) _mm_pause();
    else sched_yield();
}

// Does piece(i) for all i below `pieces` with all others that call the same, and returns once all are
// done. Pieces are taken `at_once` so many, because taking costs 0.1 us when others do it too.
template <class Piece>
inline void share(Stretch* stretch, int pieces, int at_once, const Piece& piece) {
    if (!stretch) {  // alone
        for (int i = 0; i < pieces; i++) piece(i);
        return;
    }
    int mine = 0;
    for (int first; (first = __atomic_fetch_add(&stretch->next, at_once, RELAXED)) < pieces;) {
        int last = first + at_once < pieces ? first + at_once : pieces;
        for (int i = first; i < last; i++) piece(i);
        mine += last - first;
    }
    if (mine) __atomic_fetch_add(&stretch->done, mine, RELEASE);
    for (int looks = 0; __atomic_load_n(&stretch->done, ACQUIRE) < pieces;) look_again(looks);
}

constexpr int MOST_THREADS = 256;

class Team {
public:
    explicit Team(int size) : size_(1), process_(getpid()) {
        if (size > MOST_THREADS) size = MOST_THREADS;
        auto start = [](void* team) -> void* { return ((Team*)team)->wait(), nullptr; };
        while (size_ < size && pthread_create(&threads_[size_], nullptr, start, this) == 0) size_++;
    }
    ~Team() {
        if (size() == 1) return;
        __atomic_store_n(&quit_, 1, SEQ);
        announce(MOST_THREADS);
        for (int i = 1; i < size_; i++) pthread_join(threads_[i], nullptr);
    }
    // A process forked from the one that made the threads has none of them, and must not wait for them.
    int size() const { return getpid() == process_ ? size_ : 1; }

    // Calls task(of, 0) here and, with other numbers below `members`, in as many others as come in time;
    // returns when all have left it.
    void run(void (*task)(void* of, int number), void* of, int members) {
        if (members == 1) return task(of, 0);
        task_ = task, of_ = of, members_ = members, joined_ = 0;
        __atomic_store_n(&open_, 1, SEQ);
        announce(members - 1);
        task(of, 0);
        __atomic_store_n(&open_, 0, SEQ);
        for (int looks = 0; __atomic_load_n(&inside_, SEQ);) look_again(looks);
    }

private:
    void announce(int wanted) {
        __atomic_fetch_add(&calls_, 1, SEQ);
        if (__atomic_load_n(&asleep_, SEQ)) syscall(SYS_futex, &calls_, FUTEX_WAKE_PRIVATE, wanted, 0, 0, 0);
    }
    void wait() {
        for (int seen = 0; !__atomic_load_n(&quit_, SEQ);) {
            // Looks for a while before it sleeps: waking takes the system some 50 us.
            for (int looks = 0; __atomic_load_n(&calls_, ACQUIRE) == seen; looks++) {
                if (looks < LOOKS) { _mm_pause(); continue; }
                __atomic_fetch_add(&asleep_, 1, SEQ);
                syscall(SYS_futex, &calls_, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
                __atomic_fetch_sub(&asleep_, 1, SEQ);
            }
            seen = __atomic_load_n(&calls_, ACQUIRE);
            // In this order: `run` closes the call and then waits until nobody is inside. Who is inside
            // before it looks, and finds the call open, works on what stays in place until it has left;
            // who comes later finds it closed. Coming twice to one call is no harm: all is taken.
            __atomic_fetch_add(&inside_, 1, SEQ);
            if (__atomic_load_n(&open_, SEQ)) {
                int number = __atomic_add_fetch(&joined_, 1, SEQ);
                if (number < members_) task_(of_, number);
            }
            __atomic_fetch_sub(&inside_, 1, SEQ);
        }
    }
    static constexpr int LOOKS = 1000;  // up to 0.1 ms
    int size_, calls_ = 0, asleep_ = 0, open_ = 0, inside_ = 0, quit_ = 0, members_ = 0, joined_ = 0;
    void (*task_)(void*, int) = nullptr;
    void* of_ = nullptr;
    pid_t process_;
    pthread_t threads_[MOST_THREADS];
};

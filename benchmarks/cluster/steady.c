// Preloaded into gloo ranks that are pinned to one core each. gloo's event thread spins while the main thread, on the
// same core, holds the lock that it wants; here it gives the core away when epoll_wait keeps returning at once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <time.h>

static __thread uint64_t last_return;
static __thread int at_once;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout) {
  static int (*real)(int, struct epoll_event *, int, int);
  if (!real) real = dlsym(RTLD_NEXT, "epoll_wait");
  at_once = last_return && now_ns() - last_return < 3000 ? at_once + 1 : 0;
  if (at_once >= 2) sched_yield();
  int found = real(epoll, events, most, timeout);
  last_return = now_ns();
  return found;
}

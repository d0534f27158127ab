// A network between hosts (network namespaces), in user space: every ordered pair has a rate and a delay.
//
//   forwarder LINKS LIMIT_SECONDS NAMESPACE...
//
// Makes a TAP device "eth0" in every namespace and carries IPv4 packets between them by the last byte of the address
// (host i has 10.77.0.(i+1)). LINKS is a file of lines "source target megabits_per_second delay_us" (rate 0: no limit),
// read again on SIGHUP. A host's packets leave one after another at the rate of the link they take, as on a wire that
// all its links share; the delay is added behind that. Prints "ready" once the devices are there; ends with its parent.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
  MOST_HOSTS = 16,
  HEADER = 10,              // struct virtio_net_hdr, which carries what segmentation offload needs
  PACKET = 65536 + 256,     // with offload a packet is up to 64 KiB
  QUEUE = 4096,
  BURST = 16,               // packets read from a host before the others have their turn
  POOL = 65536,
};
static const uint64_t AHEAD_NS = 300000;  // how far a host's wire may be booked ahead before its packets wait outside
static const uint64_t RETRY_NS = 20000;

typedef struct {
  uint64_t due;
  int length;
  unsigned char *bytes;
} Packet;

typedef struct {
  Packet packets[QUEUE];
  unsigned head, tail;
} Queue;

static int hosts, devices[MOST_HOSTS];
static double bytes_per_ns[MOST_HOSTS][MOST_HOSTS];
static uint64_t delay_ns[MOST_HOSTS][MOST_HOSTS], wire_free[MOST_HOSTS];
static Queue queues[MOST_HOSTS][MOST_HOSTS];
static unsigned char *pool[POOL];
static int pooled;
static volatile sig_atomic_t reload = 1;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static unsigned char *take(void) { return pooled ? pool[--pooled] : malloc(PACKET); }

static void give(unsigned char *bytes) {
  if (pooled < POOL) pool[pooled++] = bytes;
  else free(bytes);
}

static void on_hangup(int signal) { (void)signal; reload = 1; }

static void read_links(const char *path) {
  reload = 0;
  FILE *file = fopen(path, "r");
  if (!file) return;
  memset(bytes_per_ns, 0, sizeof bytes_per_ns);
  memset(delay_ns, 0, sizeof delay_ns);
  int a, b;
  double megabits, delay_us;
  while (fscanf(file, "%d %d %lf %lf", &a, &b, &megabits, &delay_us) == 4) {
    if (a < 0 || b < 0 || a >= hosts || b >= hosts) continue;
    bytes_per_ns[a][b] = megabits * 1e6 / 8 / 1e9;
    delay_ns[a][b] = (uint64_t)(delay_us * 1000);
  }
  fclose(file);
}

static int open_device(const char *name) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", name);
  int space = open(path, O_RDONLY);
  if (space < 0 || setns(space, CLONE_NEWNET)) { perror(path); exit(1); }
  close(space);
  int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  struct ifreq request;
  memset(&request, 0, sizeof request);
  strcpy(request.ifr_name, "eth0");
  request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  if (device < 0 || ioctl(device, TUNSETIFF, &request)) { perror("/dev/net/tun"); exit(1); }
  int header = HEADER;
  ioctl(device, TUNSETVNETHDRSZ, &header);
  ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4);
  return device;
}

// Packets that are due go to their host; returns whether any did, and lowers *next to when the next one is due.
static int deliver(int source, uint64_t now, uint64_t *next) {
  int busy = 0;
  for (int target = 0; target < hosts; target++) {
    Queue *queue = &queues[source][target];
    while (queue->head != queue->tail) {
      Packet *packet = &queue->packets[queue->head % QUEUE];
      if (packet->due > now) {
        if (packet->due < *next) *next = packet->due;
        break;
      }
      if (write(devices[target], packet->bytes, packet->length) < 0 && errno == EAGAIN) {
        if (now + RETRY_NS < *next) *next = now + RETRY_NS;
        break;
      }
      give(packet->bytes);
      queue->head++;
      busy = 1;
    }
  }
  return busy;
}

// Packets that a host wants to send are put on its wire.
static int collect(int source, uint64_t *next) {
  int busy = 0;
  for (int count = 0; count < BURST && wire_free[source] < now_ns() + AHEAD_NS; count++) {
    unsigned char *bytes = take();
    int length = read(devices[source], bytes, PACKET);
    if (length <= 0) {
      give(bytes);
      break;
    }
    busy = 1;
    const unsigned char *frame = bytes + HEADER;
    int is_ip = length >= HEADER + 34 && frame[12] == 8 && frame[13] == 0;
    int target = is_ip ? frame[33] - 1 : -1;
    Queue *queue = target >= 0 && target < hosts && target != source ? &queues[source][target] : NULL;
    if (!queue || queue->tail - queue->head >= QUEUE) {
      give(bytes);
      continue;
    }
    uint64_t now = now_ns(), start = wire_free[source] > now ? wire_free[source] : now;
    double rate = bytes_per_ns[source][target];
    wire_free[source] = start + (rate > 0 ? (uint64_t)((length - HEADER) / rate) : 0);
    Packet packet = {wire_free[source] + delay_ns[source][target], length, bytes};
    queue->packets[queue->tail++ % QUEUE] = packet;
    if (packet.due < *next) *next = packet.due;
  }
  return busy;
}

int main(int count, char **words) {
  if (count < 4 || count - 3 > MOST_HOSTS) {
    fprintf(stderr, "usage: forwarder LINKS LIMIT_SECONDS NAMESPACE...\n");
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  prctl(PR_SET_TIMERSLACK, 1000);
  alarm(atoi(words[2]));
  signal(SIGHUP, on_hangup);
  hosts = count - 3;
  for (int i = 0; i < hosts; i++) devices[i] = open_device(words[3 + i]);
  printf("ready\n");
  fflush(stdout);
  for (;;) {
    if (reload) read_links(words[1]);
    uint64_t now = now_ns(), next = UINT64_MAX;
    struct pollfd polled[MOST_HOSTS];
    int busy = 0;
    for (int i = 0; i < hosts; i++) {
      busy |= deliver(i, now, &next);
      busy |= collect(i, &next);
      int open_wire = wire_free[i] < now + AHEAD_NS;
      polled[i] = (struct pollfd){open_wire ? devices[i] : -1, POLLIN, 0};
      if (!open_wire && wire_free[i] - AHEAD_NS < next) next = wire_free[i] - AHEAD_NS;
    }
    now = now_ns();
    if (busy || next <= now) continue;
    struct timespec wait = {(next - now) / 1000000000ull, (next - now) % 1000000000ull};
    ppoll(polled, hosts, next == UINT64_MAX ? NULL : &wait, NULL);
  }
}

/* Preloaded into QEMU's tools: each sync takes QCOW2_SYNC_DELAY_US longer, as on a disk that is no memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static int then_wait(int (*sync)(int), int fd) {
    int result = sync(fd);
    const char *text = getenv("QCOW2_SYNC_DELAY_US");
    long us = text ? atol(text) : 0;
    struct timespec rest = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&rest, NULL);
    return result;
}

int fdatasync(int fd) {
    return then_wait((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"), fd);
}

int fsync(int fd) {
    return then_wait((int (*)(int))dlsym(RTLD_NEXT, "fsync"), fd);
}

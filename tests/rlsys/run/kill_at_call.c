/* Preload this library to count and record the calls of a process that change files, and to kill it at the n-th call.
 *
 * It sees all calls of libc functions, from any library. It misses only the renames inside the safetensors library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls, last;
static int halved, notes = -1;

/* Start to count. kill_at: the process is killed before this call, 0 for never; half: after half of a write. */
void arm(long kill_at, int half, int descriptor) {
    calls = 0;
    last = kill_at;
    halved = half;
    notes = descriptor;
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

/* Record a call, with its path or the path of its open file. Return whether the process must die at this call. */
static int reached(const char *name, int descriptor, const char *path) {
    if (notes < 0) return 0;
    char line[2 * PATH_MAX], link[64], target[PATH_MAX];
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, target, sizeof target - 1);
        target[size < 0 ? 0 : size] = 0;
        path = target;
        if (path[0] != '/') return 0; /* a pipe or a socket */
    }
    int size = snprintf(line, sizeof line, "%s %s\n", name, path);
    syscall(SYS_write, notes, line, (size_t)size);
    return ++calls == last;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define STOP(name, descriptor, path) do { if (reached(name, descriptor, path)) die(); } while (0)
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t mode = va_arg(rest, mode_t);                          \
        va_end(rest);                                                \
        if (CHANGES(flags)) STOP("open", -1, path);                  \
        return REAL(name)(path, flags, mode);                        \
    }
#define OPENAT(name)                                                 \
    int name(int folder, const char *path, int flags, ...) {         \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t mode = va_arg(rest, mode_t);                          \
        va_end(rest);                                                \
        if (CHANGES(flags)) STOP("open", -1, path);                  \
        return REAL(name)(folder, path, flags, mode);                \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *data, size_t size) {
    if (reached("write", descriptor, NULL)) {
        if (halved) REAL(write)(descriptor, data, size / 2);
        die();
    }
    return REAL(write)(descriptor, data, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    STOP("write", descriptor, NULL);
    return REAL(writev)(descriptor, parts, count);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    STOP("write", descriptor, NULL);
    return REAL(pwrite64)(descriptor, data, size, offset);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    STOP("write", to, NULL);
    return REAL(sendfile64)(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    STOP("write", to, NULL);
    return REAL(copy_file_range)(from, a, to, b, size, flags);
}
int ftruncate64(int descriptor, off64_t size) {
    STOP("write", descriptor, NULL);
    return REAL(ftruncate64)(descriptor, size);
}
int fsync(int descriptor) {
    STOP("fsync", descriptor, NULL);
    return REAL(fsync)(descriptor);
}
int fdatasync(int descriptor) {
    STOP("fsync", descriptor, NULL);
    return REAL(fdatasync)(descriptor);
}
int rename(const char *from, const char *to) {
    STOP("rename", -1, to);
    return REAL(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    STOP("rename", -1, to);
    return REAL(renameat)(a, from, b, to);
}
int link(const char *from, const char *to) {
    STOP("link", -1, to);
    return REAL(link)(from, to);
}
int mkdir(const char *path, mode_t mode) {
    STOP("mkdir", -1, path);
    return REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    STOP("mkdir", -1, path);
    return REAL(mkdirat)(folder, path, mode);
}
int rmdir(const char *path) {
    STOP("rmdir", -1, path);
    return REAL(rmdir)(path);
}
int unlink(const char *path) {
    STOP("unlink", -1, path);
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    STOP(flags & AT_REMOVEDIR ? "rmdir" : "unlink", -1, path);
    return REAL(unlinkat)(folder, path, flags);
}

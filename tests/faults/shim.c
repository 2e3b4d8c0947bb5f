/* Counts the calls that change a folder, and at the k-th of them kills the process, tears a write, or says that the disk is full.

   Loaded in front of the C library (LD_PRELOAD), so Python, Rust and C++ all pass through it. Nothing happens until `shim_arm`
   is called, in a child that has been forked for the purpose; every counted call is then a line of the journal:
   "name<TAB>path<TAB>bytes<TAB>old path", written before anything else is done. Bytes are those of a write, or of the whole file
   that is synced; a renamed file has an old path. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, TORN, ONCE, FROM_THEN_ON, SHORT_ONCE, SHORT_FROM_THEN_ON };
enum verdict { PASS, REFUSE, HALF };

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_long count;
static long at;
static enum mode mode;
static int error, journal = -1;

#define REAL(result, name, ...)                                                                                          \
    static result (*real)(__VA_ARGS__);                                                                                  \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static ssize_t really_write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    return real(fd, data, size);
}

void shim_arm(const char *below, long k, int how, int number, int to) {
    folder_length = (size_t)snprintf(folder, sizeof folder, "%s", below);
    at = k, mode = (enum mode)how, error = number, journal = to;
    atomic_store(&count, 0);
}

void shim_disarm(void) { folder_length = 0; }

/* Absolute path of what `path` means beside the open folder `fd`, or of the file `fd` where there is no path. */
static void locate(char *found, int fd, const char *path) {
    char link[64];
    ssize_t size = 0;
    found[0] = 0;
    if (path && path[0] == '/') {
        snprintf(found, PATH_MAX, "%s", path);
        return;
    }
    if (fd == AT_FDCWD) {
        if (!getcwd(found, PATH_MAX)) return;
        size = (ssize_t)strlen(found);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if ((size = readlink(link, found, PATH_MAX - 1)) < 0) size = 0;
        found[size] = 0;
    }
    if (path) snprintf(found + size, PATH_MAX - (size_t)size, "/%s", path);
}

static int needs_space(const char *name) { return strncmp(name, "unlink", 6) && strcmp(name, "rmdir"); }

static int below(const char *where) {
    return !strncmp(where, folder, folder_length) && (!where[folder_length] || where[folder_length] == '/');
}

/* What becomes of this call. `size`: bytes of a write, else -1. May not return. */
static enum verdict strike_moved(const char *name, int fd, const char *path, long size, int old_fd, const char *old_path) {
    char where[PATH_MAX], old[PATH_MAX] = "", said[2 * PATH_MAX + 64];
    struct stat file;
    int saved = errno;
    if (!folder_length) return PASS;
    locate(where, fd, path);
    if (!below(where)) {
        errno = saved;
        return PASS;
    }
    if (old_path) locate(old, old_fd, old_path);
    if (strstr(name, "sync") && !fstat(fd, &file)) size = (long)file.st_size;
    long number = atomic_fetch_add(&count, 1) + 1;
    int length = snprintf(said, sizeof said, "%s\t%s\t%ld\t%s\n", name, where + folder_length, size,
                          below(old) ? old + folder_length : "");
    if (journal >= 0) really_write(journal, said, (size_t)length);
    errno = saved;
    int suits = error != ENOSPC || needs_space(name); /* a full disk lets files go */
    int now = number == at, later = number > at;
    switch (mode) {
    case COUNT:
        return PASS;
    case KILL:
        if (now) kill(getpid(), SIGKILL);
        return PASS;
    case TORN:
        return now ? HALF : PASS;
    case ONCE:
        return now && suits ? REFUSE : PASS;
    case FROM_THEN_ON:
        return (now || later) && suits ? REFUSE : PASS;
    case SHORT_ONCE:
        return now ? HALF : number == at + 1 && suits ? REFUSE : PASS;
    case SHORT_FROM_THEN_ON:
        return now ? HALF : later && suits ? REFUSE : PASS;
    }
    return PASS;
}

static enum verdict strike(const char *name, int fd, const char *path, long size) {
    return strike_moved(name, fd, path, size, -1, NULL);
}

#define REFUSED (errno = error, -1)
#define AFTER(result)                                                                                                    \
    do {                                                                                                                 \
        if (mode == TORN) kill(getpid(), SIGKILL);                                                                       \
        return result;                                                                                                   \
    } while (0)

#define WRITES(name, offset, parameters, passed, half)                                                                   \
    ssize_t name parameters {                                                                                            \
        REAL(ssize_t, name, int, const void *, size_t offset);                                                           \
        switch (strike(#name, fd, NULL, (long)size)) {                                                                   \
        case REFUSE:                                                                                                     \
            return REFUSED;                                                                                              \
        case HALF: {                                                                                                     \
            ssize_t done = real half;                                                                                    \
            AFTER(done);                                                                                                 \
        }                                                                                                                \
        default:                                                                                                         \
            return real passed;                                                                                          \
        }                                                                                                                \
    }

#define COMMA ,
WRITES(write, , (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITES(pwrite, COMMA off_t, (int fd, const void *data, size_t size, off_t to), (fd, data, size, to), (fd, data, size / 2, to))
WRITES(pwrite64, COMMA off64_t, (int fd, const void *data, size_t size, off64_t to), (fd, data, size, to),
       (fd, data, size / 2, to))

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    long size = 0;
    for (int i = 0; i < number; i++) size += (long)parts[i].iov_len;
    switch (strike("writev", fd, NULL, size)) {
    case REFUSE:
        return REFUSED;
    case HALF: {
        ssize_t done = really_write(fd, parts[0].iov_base, parts[0].iov_len / 2);
        AFTER(done);
    }
    default:
        return real(fd, parts, number);
    }
}

/* Calls that either happen or do not. */
#define WHOLE(name, types, parameters, fd, path, passed)                                                                 \
    int name parameters {                                                                                                \
        REAL(int, name, types);                                                                                          \
        return strike(#name, fd, path, -1) == REFUSE ? REFUSED : real passed;                                            \
    }
#define TYPES(...) __VA_ARGS__

WHOLE(fsync, TYPES(int), (int fd), fd, NULL, (fd))
WHOLE(fdatasync, TYPES(int), (int fd), fd, NULL, (fd))
WHOLE(ftruncate, TYPES(int, off_t), (int fd, off_t size), fd, NULL, (fd, size))
WHOLE(ftruncate64, TYPES(int, off64_t), (int fd, off64_t size), fd, NULL, (fd, size))
WHOLE(truncate, TYPES(const char *, off_t), (const char *path, off_t size), AT_FDCWD, path, (path, size))
WHOLE(truncate64, TYPES(const char *, off64_t), (const char *path, off64_t size), AT_FDCWD, path, (path, size))
WHOLE(unlink, TYPES(const char *), (const char *path), AT_FDCWD, path, (path))
WHOLE(unlinkat, TYPES(int, const char *, int), (int fd, const char *path, int flags), fd, path, (fd, path, flags))
WHOLE(rmdir, TYPES(const char *), (const char *path), AT_FDCWD, path, (path))
WHOLE(mkdir, TYPES(const char *, mode_t), (const char *path, mode_t bits), AT_FDCWD, path, (path, bits))
WHOLE(mkdirat, TYPES(int, const char *, mode_t), (int fd, const char *path, mode_t bits), fd, path, (fd, path, bits))

#define MOVES(name, types, parameters, from_fd, from, to_fd, to, passed)                                                 \
    int name parameters {                                                                                                \
        REAL(int, name, types);                                                                                          \
        return strike_moved(#name, to_fd, to, -1, from_fd, from) == REFUSE ? REFUSED : real passed;                      \
    }

MOVES(rename, TYPES(const char *, const char *), (const char *from, const char *to), AT_FDCWD, from, AT_FDCWD, to, (from, to))
MOVES(renameat, TYPES(int, const char *, int, const char *), (int a, const char *from, int b, const char *to), a, from, b, to,
      (a, from, b, to))
MOVES(renameat2, TYPES(int, const char *, int, const char *, unsigned),
      (int a, const char *from, int b, const char *to, unsigned flags), a, from, b, to, (a, from, b, to, flags))
MOVES(link, TYPES(const char *, const char *), (const char *from, const char *to), AT_FDCWD, from, AT_FDCWD, to, (from, to))
MOVES(linkat, TYPES(int, const char *, int, const char *, int), (int a, const char *from, int b, const char *to, int flags), a,
      from, b, to, (a, from, b, to, flags))

/* Opening counts where it may create, empty or change a file. */
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define BITS(flags, bits)                                                                                                \
    mode_t bits = 0;                                                                                                     \
    if ((flags) & O_CREAT) {                                                                                             \
        va_list rest;                                                                                                    \
        va_start(rest, flags);                                                                                           \
        bits = (mode_t)va_arg(rest, int);                                                                                \
        va_end(rest);                                                                                                    \
    }
#define OPENS(name)                                                                                                      \
    int name(const char *path, int flags, ...) {                                                                         \
        REAL(int, name, const char *, int, ...);                                                                         \
        BITS(flags, bits)                                                                                                \
        return CHANGES(flags) && strike(#name, AT_FDCWD, path, -1) == REFUSE ? REFUSED : real(path, flags, bits);        \
    }
#define OPENS_AT(name)                                                                                                   \
    int name(int fd, const char *path, int flags, ...) {                                                                 \
        REAL(int, name, int, const char *, int, ...);                                                                    \
        BITS(flags, bits)                                                                                                \
        return CHANGES(flags) && strike(#name, fd, path, -1) == REFUSE ? REFUSED : real(fd, path, flags, bits);          \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

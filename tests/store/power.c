/* Records what a process writes to the files of one directory, and what it flushes: see power.py. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct record {
    char op;  /* w(rite), t(runcate), b(egin of a flush), e(nd of a flush), u(nlink) */
    char name_bytes;
    char unused[6];
    int64_t at;  /* the offset, the new length, or the number of the flush */
    int64_t bytes;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *directory;
static int log_fd = -1;
static int64_t flushes;

__attribute__((constructor)) static void start(void)
{
    directory = getenv("POWER_DIRECTORY");
    log_fd = REAL(open)(getenv("POWER_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (!directory || log_fd < 0)
        abort();
}

/* The order of records is the order of what they tell, in all threads and processes. */
static void lock(void) { pthread_mutex_lock(&mutex); flock(log_fd, LOCK_EX); }
static void unlock(void) { flock(log_fd, LOCK_UN); pthread_mutex_unlock(&mutex); }

/* The name within the directory ("" is the directory), NULL for files elsewhere. The index in -shm is not data. */
static const char *within(const char *path)
{
    size_t length = strlen(directory);
    if (strncmp(path, directory, length) || (path[length] && path[length] != '/'))
        return NULL;
    const char *name = path[length] ? path + length + 1 : path + length;
    return strstr(name, "-shm") || strlen(name) > 100 ? NULL : name;
}

static const char *name_of(int fd, char *path, size_t size)
{
    char link[40] = "/proc/self/fd/", digits[12];
    int count = 0;
    if (fd < 0 || log_fd < 0)
        return NULL;
    do digits[count++] = '0' + fd % 10; while (fd /= 10);
    char *end = link + strlen(link);
    while (count) *end++ = digits[--count];
    *end = 0;
    ssize_t length = readlink(link, path, size - 1);
    if (length < 0)
        return NULL;
    path[length] = 0;
    return within(path);
}

static void record(char op, const char *name, int64_t at, const void *data, int64_t bytes)
{
    struct record head = {.op = op, .name_bytes = strlen(name), .at = at, .bytes = bytes};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)name, strlen(name)}, {(void *)data, bytes}};
    if (writev(log_fd, parts, 3) != (ssize_t)(sizeof head + strlen(name) + bytes))
        abort();
}

static ssize_t written(int fd, const void *data, size_t bytes, off64_t at, ssize_t (*real)(int, const void *, size_t))
{
    char path[4096];
    const char *name = name_of(fd, path, sizeof path);
    if (!name)
        return real ? real(fd, data, bytes) : REAL(pwrite64)(fd, data, bytes, at);
    lock();
    if (real)
        at = lseek64(fd, 0, SEEK_CUR);
    ssize_t done = real ? real(fd, data, bytes) : REAL(pwrite64)(fd, data, bytes, at);
    int error = errno;
    if (done > 0)
        record('w', name, at, data, done);
    unlock();
    errno = error;
    return done;
}

ssize_t write(int fd, const void *data, size_t bytes) { return written(fd, data, bytes, 0, REAL(write)); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) { return written(fd, data, bytes, at, NULL); }
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t at) { return written(fd, data, bytes, at, NULL); }

static int truncated(int fd, off64_t length)
{
    char path[4096];
    const char *name = name_of(fd, path, sizeof path);
    if (!name)
        return REAL(ftruncate64)(fd, length);
    lock();
    int result = REAL(ftruncate64)(fd, length), error = errno;
    if (!result)
        record('t', name, length, "", 0);
    unlock();
    errno = error;
    return result;
}

int ftruncate(int fd, off_t length) { return truncated(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncated(fd, length); }

/* A flush covers what was written before it began, and is done when it ends. Others write meanwhile. */
static int flushed(int fd, int (*real)(int))
{
    char path[4096];
    const char *name = name_of(fd, path, sizeof path);
    if (!name)
        return real(fd);
    lock();
    int64_t number = ++flushes << 32 | getpid();
    record('b', name, number, "", 0);
    unlock();
    int result = real(fd), error = errno;
    if (!result) {
        lock();
        record('e', name, number, "", 0);
        unlock();
    }
    errno = error;
    return result;
}

int fsync(int fd) { return flushed(fd, REAL(fsync)); }
int fdatasync(int fd) { return flushed(fd, REAL(fdatasync)); }

int unlink(const char *path)
{
    const char *name = log_fd < 0 ? NULL : within(path);
    if (!name)
        return REAL(unlink)(path);
    lock();
    record('u', name, 0, "", 0);
    int result = REAL(unlink)(path), error = errno;
    unlock();
    errno = error;
    return result;
}

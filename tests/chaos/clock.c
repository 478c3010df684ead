/* A clock that is wrong by as many seconds as the file CLOCK says, which may change. For /etc/ld.so.preload. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const volatile int64_t *wrong;
static __typeof__(&clock_gettime) real;

__attribute__((constructor)) static void start(void)
{
    real = REAL(clock_gettime);
    int fd = open(CLOCK, O_RDONLY | O_CLOEXEC);
    void *place = fd < 0 ? MAP_FAILED : mmap(0, sizeof *wrong, PROT_READ, MAP_SHARED, fd, 0);
    if (fd >= 0)
        close(fd);
    if (place != MAP_FAILED)
        wrong = place;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (real ? real : REAL(clock_gettime))(clock, now);
    if (result == 0 && wrong && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *wrong;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int result = REAL(gettimeofday)(now, zone);
    if (result == 0 && wrong)
        now->tv_sec += *wrong;
    return result;
}

time_t time(time_t *where)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where)
        *where = now.tv_sec;
    return now.tv_sec;
}

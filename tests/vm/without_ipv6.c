/* A host that was booted with ipv6.disable=1, for one process (LD_PRELOAD): no sockets of the family, no sysctls, and
   the kernel knows no link attributes of the family. The last is shown by asking the real kernel about a family that it
   really doesn't know. Numbers: linux/netlink.h, linux/rtnetlink.h, linux/if_link.h. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>

enum { RTM_NEWLINK = 16, RTM_SETLINK = 19, IFLA_AF_SPEC = 26, HEADERS = 16 + 16, UNKNOWN_FAMILY = 45 };

struct attribute { unsigned short length, kind; };

int socket(int family, int type, int protocol) {
    int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    if (family == AF_INET6) { errno = EAFNOSUPPORT; return -1; }
    return real(family, type, protocol);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t to_size) {
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    static _Thread_local unsigned char copy[65536];
    int family = 0;
    socklen_t length = sizeof family;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &length);
    if (family == AF_NETLINK && size > HEADERS && size <= sizeof copy) {
        memcpy(copy, data, size);
        data = copy;
        unsigned short kind = *(unsigned short *)(copy + 4);
        if (kind == RTM_NEWLINK || kind == RTM_SETLINK)
            for (size_t at = HEADERS; at + 4 <= size; ) {
                struct attribute *outer = (struct attribute *)(copy + at), *inner = outer + 1;
                if (outer->length < 4) break;
                if ((outer->kind & 0x3fff) == IFLA_AF_SPEC && (inner->kind & 0x3fff) == AF_INET6)
                    inner->kind = UNKNOWN_FAMILY;
                at += (outer->length + 3u) & ~3u;
            }
    }
    return real(fd, data, size, flags, to, to_size);
}

ssize_t send(int fd, const void *data, size_t size, int flags) { return sendto(fd, data, size, flags, 0, 0); }

static int absent(const char *path) { return strncmp(path, "/proc/sys/net/ipv6", 18) == 0; }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);  \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        mode_t mode = va_arg(more, mode_t);                             \
        va_end(more);                                                   \
        if (absent(path)) { errno = ENOENT; return -1; }                \
        return real(path, flags, mode);                                 \
    }
OPEN(open)
OPEN(open64)

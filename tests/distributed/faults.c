/* Faults at chosen file operations, for the tests of checkpoints. Loaded with LD_PRELOAD.

   Once armed, every operation that changes something under `root` is an event with a number. With
   FAULT_KILL the process is killed before, halfway through or after event `at`; with FAULT_ERROR
   event `at` and, if `sticky`, every later one that could need space or permission fails with
   `code`. Events are written to `log`, one a line: number, kind, bytes, path. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAULT_COUNT, FAULT_KILL, FAULT_ERROR };
enum { BEFORE, HALFWAY, AFTER };

static struct {
  char root[1024];
  size_t length;
  int log, action, phase, code, sticky;
  long at, count;
  int armed;
} fault;

void fault_arm(const char *root, const char *log, int action, long at, int phase, int code,
               int sticky) {
  fault.armed = 0;
  strncpy(fault.root, root, sizeof fault.root - 1);
  fault.length = strlen(fault.root);
  fault.log = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  fault.action = action;
  fault.at = at;
  fault.phase = phase;
  fault.code = code;
  fault.sticky = sticky;
  fault.count = 0;
  fault.armed = 1;
}

long fault_disarm(void) {
  if (fault.armed) syscall(SYS_close, fault.log);
  fault.armed = 0;
  return fault.count;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static int inside(const char *path) {
  return !strncmp(path, fault.root, fault.length) &&
         (path[fault.length] == '/' || !path[fault.length]);
}

/* The path of `name` relative to folder `fd`, or of `fd` itself; 0 if it is not under the root. */
static int resolve(int fd, const char *name, char *out, size_t size) {
  if (!fault.armed) return 0;
  if (name && name[0] == '/') {
    snprintf(out, size, "%s", name);
    return inside(out);
  }
  char link[64];
  if (fd == AT_FDCWD) {
    if (syscall(SYS_getcwd, out, size) < 0) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, out, size - 1);
    if (n < 0) return 0;
    out[n] = 0;
  }
  if (name) {
    size_t n = strlen(out);
    snprintf(out + n, size - n, "/%s", name);
  }
  return inside(out);
}

/* Returns 1 if this operation is to fail; `ours` says whether it is event `at`. */
static int enter(const char *kind, const char *path, size_t bytes, int needs_space, int *ours) {
  char line[1400];
  long number = __atomic_add_fetch(&fault.count, 1, __ATOMIC_SEQ_CST);
  int n = snprintf(line, sizeof line, "%ld %s %zu %s\n", number, kind, bytes,
                   path + (path[fault.length] ? fault.length + 1 : fault.length));
  if (syscall(SYS_write, fault.log, line, n) < 0) return 0;
  *ours = number == fault.at;
  if (fault.action == FAULT_KILL && *ours && fault.phase == BEFORE) die();
  if (fault.action == FAULT_ERROR &&
      (*ours || (fault.sticky && number > fault.at && needs_space))) {
    errno = fault.code;
    return 1;
  }
  return 0;
}

static void leave(int ours) {
  int kept = errno;
  if (ours && fault.action == FAULT_KILL && fault.phase == AFTER) die();
  errno = kept;
}

static int halfway(int ours) {
  return ours && fault.action == FAULT_KILL && fault.phase == HALFWAY;
}

#define NEXT(name) \
  static __typeof__(&name) next;  \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define PATH_OF(fd, name) \
  char path[1200];        \
  int ours = 0;           \
  int watched = resolve(fd, name, path, sizeof path)

#define WRITER(name, params, call, half, total)                        \
  ssize_t name params {                                                \
    NEXT(name);                                                        \
    PATH_OF(fd, NULL);                                                 \
    if (!watched) return next call;                                    \
    if (enter("write", path, total, 1, &ours)) return -1;              \
    if (halfway(ours)) {                                               \
      half;                                                            \
      die();                                                           \
    }                                                                  \
    ssize_t done = next call;                                          \
    leave(ours);                                                       \
    return done;                                                       \
  }

static size_t sum(const struct iovec *v, int n) {
  size_t total = 0;
  for (int i = 0; i < n; i++) total += v[i].iov_len;
  return total;
}

WRITER(write, (int fd, const void *b, size_t n), (fd, b, n), next(fd, b, n / 2), n)
WRITER(pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), next(fd, b, n / 2, o), n)
WRITER(pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o),
       next(fd, b, n / 2, o), n)
WRITER(writev, (int fd, const struct iovec *v, int n), (fd, v, n),
       next(fd, v, n / 2 ? n / 2 : 0), sum(v, n))

/* shutil.copy: the kernel copies, so half of it is asked for. */
#define COPIER(name, offset_type)                                      \
  ssize_t name(int fd, int from, offset_type *offset, size_t n) {      \
    NEXT(name);                                                        \
    PATH_OF(fd, NULL);                                                 \
    if (!watched) return next(fd, from, offset, n);                    \
    if (enter("write", path, n, 1, &ours)) return -1;                  \
    if (halfway(ours)) {                                               \
      struct stat status;                                              \
      fstat(from, &status);                                            \
      next(fd, from, offset, status.st_size / 2);                      \
      die();                                                           \
    }                                                                  \
    ssize_t done = next(fd, from, offset, n);                          \
    leave(ours);                                                       \
    return done;                                                       \
  }

COPIER(sendfile, off_t)
COPIER(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *in, int fd, off64_t *out, size_t n, unsigned flags) {
  NEXT(copy_file_range);
  PATH_OF(fd, NULL);
  if (!watched) return next(from, in, fd, out, n, flags);
  if (enter("write", path, n, 1, &ours)) return -1;
  if (halfway(ours)) {
    next(from, in, fd, out, n / 2, flags);
    die();
  }
  ssize_t done = next(from, in, fd, out, n, flags);
  leave(ours);
  return done;
}

#define FILE_OP(kind, name)                              \
  int name(int fd) {                                     \
    NEXT(name);                                          \
    PATH_OF(fd, NULL);                                   \
    if (!watched) return next(fd);                       \
    if (enter(kind, path, 0, 1, &ours)) return -1;       \
    int done = next(fd);                                 \
    leave(ours);                                         \
    return done;                                         \
  }

FILE_OP("fsync", fsync)
FILE_OP("fsync", fdatasync)

#define PATH_OP(kind, name, params, call, fd, which, needs_space) \
  int name params {                                               \
    NEXT(name);                                                   \
    PATH_OF(fd, which);                                           \
    if (!watched) return next call;                               \
    if (enter(kind, path, 0, needs_space, &ours)) return -1;      \
    int done = next call;                                         \
    leave(ours);                                                  \
    return done;                                                  \
  }

PATH_OP("rename", rename, (const char *a, const char *b), (a, b), AT_FDCWD, b, 1)
PATH_OP("rename", renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b, 1)
PATH_OP("rename", renameat2, (int d, const char *a, int e, const char *b, unsigned f),
        (d, a, e, b, f), e, b, 1)
PATH_OP("unlink", unlink, (const char *a), (a), AT_FDCWD, a, 0)
PATH_OP("unlink", unlinkat, (int d, const char *a, int f), (d, a, f), d, a, 0)
PATH_OP("unlink", rmdir, (const char *a), (a), AT_FDCWD, a, 0)
PATH_OP("mkdir", mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a, 1)
PATH_OP("mkdir", mkdirat, (int d, const char *a, mode_t m), (d, a, m), d, a, 1)
PATH_OP("truncate", ftruncate, (int fd, off_t n), (fd, n), fd, NULL, 1)
PATH_OP("truncate", ftruncate64, (int fd, off64_t n), (fd, n), fd, NULL, 1)

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPENER(name, params, last, fd, which, ...)                          \
  int name params {                                                         \
    NEXT(name);                                                             \
    va_list list;                                                           \
    va_start(list, flags);                                                  \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, int) : 0;  \
    va_end(list);                                                           \
    PATH_OF(fd, which);                                                     \
    if (!watched || !WRITES(flags)) return next(__VA_ARGS__, mode);         \
    if (enter("open", path, 0, 1, &ours)) return -1;                        \
    int done = next(__VA_ARGS__, mode);                                     \
    leave(ours);                                                            \
    return done;                                                            \
  }

OPENER(open, (const char *a, int flags, ...), flags, AT_FDCWD, a, a, flags)
OPENER(open64, (const char *a, int flags, ...), flags, AT_FDCWD, a, a, flags)
OPENER(openat, (int d, const char *a, int flags, ...), flags, d, a, d, a, flags)
OPENER(openat64, (int d, const char *a, int flags, ...), flags, d, a, d, a, flags)

#define STREAM(name)                                          \
  FILE *name(const char *a, const char *m) {                  \
    NEXT(name);                                               \
    PATH_OF(AT_FDCWD, a);                                     \
    if (!watched || m[0] == 'r') return next(a, m);           \
    if (enter("open", path, 0, 1, &ours)) return NULL;        \
    FILE *done = next(a, m);                                  \
    leave(ours);                                              \
    return done;                                              \
  }

STREAM(fopen)
STREAM(fopen64)

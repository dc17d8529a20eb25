// A preloaded library that stands between a process and the C library's file-system calls.
//
// It counts every call that changes something under one folder, writes each to a trace, and, when
// armed, lets the k-th one fail with an error or kills the process instead. A call is counted
// whoever makes it: Python, safetensors' Rust, another library's own rename.
//
// Trace: one record a call, `TAG ino offset length path\0[path\0]` and `length` bytes of data.
// Tags: N new file, O file emptied on opening, W write, T truncate, S fsync, M mkdir, R rename,
// U unlink or rmdir, X a change that is not understood (the trace is then no use).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char root[PATH_MAX];
static size_t root_length;
static long calls, failing = -1;
static int failure, trace = -1, pid;

#define REAL(name, type, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

// From here on calls under `folder` count. `k`: the one that does not happen, from 1; 0 for none.
// `error`: what it fails with; 0: the process is killed. `file`: where the trace goes, or NULL.
void fault_arm(const char *folder, long k, int error, const char *file) {
  if (!realpath(folder, root)) abort();
  root_length = strlen(root);
  calls = 0, failing = k, failure = error, pid = getpid();
  trace = file ? syscall(SYS_openat, AT_FDCWD, file, O_CREAT | O_WRONLY | O_TRUNC, 0600) : -1;
}

long fault_calls(void) { return calls; }

// The path of a name beside `dir`, without its own last link; 1 where it lies under the root.
static int resolve(int dir, const char *name, char *out) {
  if (!root_length || pid != getpid()) return 0;
  char whole[2 * PATH_MAX], parent[PATH_MAX], link[64];
  if (name[0] == '/') {
    snprintf(whole, sizeof whole, "%s", name);
  } else if (dir == AT_FDCWD) {
    if (!getcwd(parent, sizeof parent)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", parent, name);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, parent, sizeof parent - 1);
    if (n < 0) return 0;
    parent[n] = 0;
    snprintf(whole, sizeof whole, "%s/%s", parent, name);
  }
  char *slash = strrchr(whole, '/');
  char base[NAME_MAX + 1];
  snprintf(base, sizeof base, "%s", slash + 1);
  *slash = 0;
  if (!realpath(*whole ? whole : "/", parent)) return 0;
  if (!*base || !strcmp(base, ".")) snprintf(out, PATH_MAX, "%s", parent);
  else snprintf(out, PATH_MAX, "%s/%.255s", parent, base);
  return !strncmp(out, root, root_length) && (!out[root_length] || out[root_length] == '/');
}

static int resolve_fd(int fd, char *out) {
  if (!root_length || pid != getpid()) return 0;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, out, PATH_MAX - 1);
  if (n < 0) return 0;
  out[n] = 0;
  return !strncmp(out, root, root_length) && (!out[root_length] || out[root_length] == '/');
}

// Counts a call; 1 where it must fail.
static int doomed(void) {
  if (++calls != failing) return 0;
  if (!failure) kill(getpid(), SIGKILL);
  errno = failure;
  return 1;
}

static void note(char tag, uint64_t ino, int64_t offset, uint64_t length, const char *path,
                 const char *other, const void *data) {
  if (trace < 0) return;
  int kept = errno;
  char head[128];
  int n = snprintf(head, sizeof head, "%c %lu %ld %lu ", tag, (unsigned long)ino, (long)offset,
                   (unsigned long)length);
  struct iovec parts[] = {{head, n},
                          {(void *)path, strlen(path) + 1},
                          {(void *)other, other ? strlen(other) + 1 : 0},
                          {(void *)data, length}};
  syscall(SYS_writev, trace, parts, 4);
  errno = kept;
}

static uint64_t ino_of(int fd) {
  struct stat s;
  return fstat(fd, &s) ? 0 : s.st_ino;
}

#define LOCKED pthread_mutex_lock(&lock)
#define UNLOCK pthread_mutex_unlock(&lock)

static int opened(int dir, const char *name, int flags, mode_t mode) {
  REAL("openat", int, int, const char *, int, ...);
  char path[PATH_MAX];
  if (!(flags & (O_CREAT | O_TRUNC)) || !resolve(dir, name, path))
    return real(dir, name, flags, mode);
  LOCKED;
  struct stat s;
  int there = !stat(path, &s), changes = there ? flags & O_TRUNC && s.st_size : 1;
  int fd = changes && doomed() ? -1 : real(dir, name, flags, mode);
  if (fd >= 0 && changes) note(there ? 'O' : 'N', ino_of(fd), 0, 0, path, NULL, NULL);
  UNLOCK;
  return fd;
}

#define MODE(last) \
  va_list rest; \
  va_start(rest, last); \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
  va_end(rest)

int open(const char *name, int flags, ...) { MODE(flags); return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags); return opened(AT_FDCWD, name, flags, mode); }
int openat(int dir, const char *name, int flags, ...) { MODE(flags); return opened(dir, name, flags, mode); }
int openat64(int dir, const char *name, int flags, ...) { MODE(flags); return opened(dir, name, flags, mode); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static FILE *streamed(const char *which, const char *name, const char *mode) {
  FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, which);
  char path[PATH_MAX];
  if (strpbrk(mode, "wa+") && resolve(AT_FDCWD, name, path)) note('X', 0, 0, 0, path, NULL, NULL);
  return real(name, mode);
}
FILE *fopen(const char *name, const char *mode) { return streamed("fopen", name, mode); }
FILE *fopen64(const char *name, const char *mode) { return streamed("fopen64", name, mode); }

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
  REAL("mmap", void *, void *, size_t, int, int, int, off_t);
  char path[PATH_MAX];
  if (fd >= 0 && flags & MAP_SHARED && protection & PROT_WRITE && resolve_fd(fd, path))
    note('X', 0, 0, 0, path, NULL, NULL);
  return real(at, n, protection, flags, fd, offset);
}

static off_t place(int fd) {
  struct stat s;
  if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &s) ? 0 : s.st_size;
  return lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t n) {
  REAL("write", ssize_t, int, const void *, size_t);
  char path[PATH_MAX];
  if (!resolve_fd(fd, path)) return real(fd, data, n);
  LOCKED;
  off_t at = place(fd);
  ssize_t done = doomed() ? -1 : real(fd, data, n);
  if (done > 0) note('W', ino_of(fd), at, done, path, NULL, data);
  UNLOCK;
  return done;
}

static ssize_t placed(const char *which, int fd, const void *data, size_t n, off_t at) {
  ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, which);
  char path[PATH_MAX];
  if (!resolve_fd(fd, path)) return real(fd, data, n, at);
  LOCKED;
  ssize_t done = doomed() ? -1 : real(fd, data, n, at);
  if (done > 0) note('W', ino_of(fd), at, done, path, NULL, data);
  UNLOCK;
  return done;
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return placed("pwrite", fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return placed("pwrite64", fd, data, n, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL("writev", ssize_t, int, const struct iovec *, int);
  char path[PATH_MAX];
  if (!resolve_fd(fd, path)) return real(fd, parts, count);
  ssize_t total = 0;  // one part at a time, which a short write may be
  for (int i = 0; i < count; i++) {
    ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
    if (done < 0) return total ? total : -1;
    total += done;
    if ((size_t)done < parts[i].iov_len) break;
  }
  return total;
}

// Copies go the way of reads and writes, which every caller of these must be ready for.
static ssize_t refused(int fd, int *mine) {
  char path[PATH_MAX];
  *mine = resolve_fd(fd, path);
  errno = ENOSYS;
  return -1;
}
ssize_t sendfile(int out, int in, off_t *at, size_t n) {
  REAL("sendfile", ssize_t, int, int, off_t *, size_t);
  int mine;
  ssize_t none = refused(out, &mine);
  return mine ? none : real(out, in, at, n);
}
ssize_t sendfile64(int out, int in, off_t *at, size_t n) { return sendfile(out, in, at, n); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *at, size_t n, unsigned flags) {
  REAL("copy_file_range", ssize_t, int, off64_t *, int, off64_t *, size_t, unsigned);
  int mine;
  ssize_t none = refused(out, &mine);
  return mine ? none : real(in, from, out, at, n, flags);
}

static int cut(const char *which, int fd, off_t length) {
  int (*real)(int, off_t) = dlsym(RTLD_NEXT, which);
  char path[PATH_MAX];
  if (!resolve_fd(fd, path)) return real(fd, length);
  LOCKED;
  int done = doomed() ? -1 : real(fd, length);
  if (!done) note('T', ino_of(fd), length, 0, path, NULL, NULL);
  UNLOCK;
  return done;
}
int ftruncate(int fd, off_t length) { return cut("ftruncate", fd, length); }
int ftruncate64(int fd, off_t length) { return cut("ftruncate64", fd, length); }

static int flushed(const char *which, int fd) {
  int (*real)(int) = dlsym(RTLD_NEXT, which);
  char path[PATH_MAX];
  if (!resolve_fd(fd, path)) return real(fd);
  LOCKED;
  int done = doomed() ? -1 : 0;  // not carried out: the trace says what it is worth
  if (!done) note('S', ino_of(fd), 0, 0, path, NULL, NULL);
  UNLOCK;
  return done;
}
int fsync(int fd) { return flushed("fsync", fd); }
int fdatasync(int fd) { return flushed("fdatasync", fd); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  char path[PATH_MAX], other[PATH_MAX];
  if (!(resolve(from, old, path) & resolve(to, new, other)))
    return syscall(SYS_renameat2, from, old, to, new, flags);
  LOCKED;
  int done = doomed() ? -1 : (int)syscall(SYS_renameat2, from, old, to, new, flags);
  if (!done) note(flags ? 'X' : 'R', 0, 0, 0, path, other, NULL);
  UNLOCK;
  return done;
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int dir, const char *name, int flags) {
  char path[PATH_MAX];
  if (!resolve(dir, name, path)) return syscall(SYS_unlinkat, dir, name, flags);
  LOCKED;
  struct stat s;
  int there = !lstat(path, &s);
  int done = there && doomed() ? -1 : (int)syscall(SYS_unlinkat, dir, name, flags);
  if (!done) note('U', 0, 0, 0, path, NULL, NULL);
  UNLOCK;
  return done;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
  struct stat s;
  return !lstat(name, &s) && S_ISDIR(s.st_mode) ? rmdir(name) : unlink(name);
}

int mkdirat(int dir, const char *name, mode_t mode) {
  char path[PATH_MAX];
  if (!resolve(dir, name, path)) return syscall(SYS_mkdirat, dir, name, mode);
  LOCKED;
  struct stat s;
  int there = !lstat(path, &s);
  int done = !there && doomed() ? -1 : (int)syscall(SYS_mkdirat, dir, name, mode);
  if (!done) note('M', lstat(path, &s) ? 0 : s.st_ino, 0, 0, path, NULL, NULL);
  UNLOCK;
  return done;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

#define UNKNOWN(name, parameters, path_dir, path_name, ...) \
  int name parameters { \
    int(*real) parameters = dlsym(RTLD_NEXT, #name); \
    char path[PATH_MAX]; \
    if (resolve(path_dir, path_name, path)) note('X', 0, 0, 0, path, NULL, NULL); \
    return real(__VA_ARGS__); \
  }
UNKNOWN(truncate, (const char *name, off_t length), AT_FDCWD, name, name, length)
UNKNOWN(symlink, (const char *to, const char *name), AT_FDCWD, name, to, name)
UNKNOWN(link, (const char *old, const char *new), AT_FDCWD, new, old, new)

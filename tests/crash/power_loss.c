/* What a disk would still have after a loss of power, for tests: preloaded, it notes what each fsync made durable.
 *
 * Into the directory named by POWER_LOSS_NOTES go copies of each file as it was when it was synced, and the file `index`:
 *   F NUMBER INODE           a file's content is in the copy NUMBER from now on
 *   D NUMBER INODE           a directory's entries are in the copy NUMBER: one "INODE TYPE NAME" a line
 * An index may be cut anywhere: what stands before the cut was durable then. Locked, so processes may share it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int copy_file(int from, int to) {
    char piece[65536];
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", from);
    int again = open(path, O_RDONLY | O_CLOEXEC); /* of its own offset, and readable */
    if (again < 0) return -1;
    ssize_t size;
    while ((size = read(again, piece, sizeof piece)) > 0)
        if (write(to, piece, size) != size) abort();
    close(again);
    return 0;
}

static void copy_entries(int from, int to) {
    int again = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = fdopendir(again);
    struct dirent *entry;
    while ((entry = readdir(directory)) != NULL)
        dprintf(to, "%lu %c %s\n", (unsigned long)entry->d_ino, entry->d_type == DT_DIR ? 'd' : 'f', entry->d_name);
    closedir(directory);
}

static void note(int fd) {
    const char *notes = getenv("POWER_LOSS_NOTES");
    struct stat found;
    char path[4096];
    if (notes == NULL || fstat(fd, &found) != 0) return;
    snprintf(path, sizeof path, "%s/index", notes);
    int index = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (index < 0 || flock(index, LOCK_EX) != 0) abort();
    long number = lseek(index, 0, SEEK_END); /* unique, since the index only grows */
    snprintf(path, sizeof path, "%s/%ld", notes, number);
    int copy = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (copy < 0) abort();
    int is_directory = S_ISDIR(found.st_mode);
    int is_noted = 1;
    if (is_directory)
        copy_entries(fd, copy);
    else
        is_noted = copy_file(fd, copy) == 0;
    close(copy);
    if (is_noted) dprintf(index, "%c %ld %lu\n", is_directory ? 'D' : 'F', number, (unsigned long)found.st_ino);
    close(index);
}

static int sync_by(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = real(fd);
    if (result == 0) note(fd);
    return result;
}

int fsync(int fd) { return sync_by("fsync", fd); }
int fdatasync(int fd) { return sync_by("fdatasync", fd); }

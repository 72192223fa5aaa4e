/* Linux lets a process use the matrix unit's state after it has asked for it. */
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

/* Linux grants the matrix unit's state to a process that asks. */
static int tiles_allowed(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

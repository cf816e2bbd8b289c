// SPDX-License-Identifier: GPL-2.0-only
/*
 * DPU compaction from a C program: show the configuration, fragment memory, try big allocations, compact with the
 * DPU, try again, compare.
 *
 *   gcc -std=c11 -Wall -o test_dpu_compact test_dpu_compact.c
 *   dpud exec -- ./test_dpu_compact
 *
 * Plain C11 and stdio; the kernel is worked through its files only. TAP 13 on stdout; exit code 0 passed, 1 failed,
 * 4 skipped (kselftest). Settings are put back at the end.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define VM "/proc/sys/vm/"
#define NODES "/sys/devices/system/node/"
#define MM "/sys/kernel/config/kernelsim/mm/"
#define ALLOC "/sys/kernel/config/kernelsim/alloc/"
#define STATS "/sys/kernel/debug/dpu_compact/stats"

#define KSFT_PASS 0
#define KSFT_FAIL 1
#define KSFT_SKIP 4

#define MAX_NODES 64
#define NR_ORDERS 11
#define HUGE_ORDER 9
#define ALL 20000	  /* more 2 MiB pages than there are */
#define PROCESS_MIB 512	  /* of which a random half is given back */

static int nr_tests, nr_failed;

/* One test. */
static bool check(bool passed, const char *format, ...)
{
	va_list args;

	printf("%s %d ", passed ? "ok" : "not ok", ++nr_tests);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	nr_failed += !passed;
	return passed;
}

/* The first line of a file, without its end; NULL, with errno set, if it cannot be read. */
static char *read_line(const char *path)
{
	static char line[4096];
	FILE *file = fopen(path, "r");

	if (!file)
		return NULL;
	if (!fgets(line, sizeof(line), file)) {
		int error = ferror(file) ? errno : ENODATA;

		fclose(file);
		errno = error;
		return NULL;
	}
	fclose(file);
	line[strcspn(line, "\n")] = '\0';
	return line;
}

static long read_long(const char *path)
{
	const char *line = read_line(path);

	return line ? strtol(line, NULL, 0) : -1;
}

/* One write(2) of the text and a newline: 0, or the errno. */
static int write_line(const char *path, const char *text)
{
	int error = 0;
	FILE *file = fopen(path, "w");

	if (!file)
		return errno;
	if (fprintf(file, "%s\n", text) < 0 || fflush(file))
		error = errno;
	fclose(file);
	return error;
}

static int write_long(const char *path, long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", value);
	return write_line(path, text);
}

/* The value behind a name in a file of `name value` lines; -1 if it is not there. */
static long value_of(const char *path, const char *wanted)
{
	char name[128];
	long value, found = -1;
	FILE *file = fopen(path, "r");

	if (!file)
		return -1;
	while (fscanf(file, "%127s %ld", name, &value) == 2)
		if (!strcmp(name, wanted))
			found = value;
	fclose(file);
	return found;
}

/* Free blocks by order, all zones of all nodes. */
static bool read_buddyinfo(long nr_free[NR_ORDERS])
{
	char line[512];
	FILE *file = fopen("/proc/buddyinfo", "r");

	if (!file)
		return false;
	memset(nr_free, 0, NR_ORDERS * sizeof(*nr_free));
	while (fgets(line, sizeof(line), file)) {
		int at = 0;

		if (sscanf(line, "Node %*d, zone %*s%n", &at) == EOF || !at)
			continue;
		for (int order = 0; order < NR_ORDERS; order++) {
			long nr;
			int length = 0;

			if (sscanf(line + at, "%ld%n", &nr, &length) != 1)
				break;
			nr_free[order] += nr;
			at += length;
		}
	}
	fclose(file);
	return true;
}

static void show_buddyinfo(const char *when, const long nr_free[NR_ORDERS])
{
	printf("# free blocks by order, %s:", when);
	for (int order = 0; order < NR_ORDERS; order++)
		printf(" %ld", nr_free[order]);
	putchar('\n');
}

static long free_pages(const long nr_free[NR_ORDERS])
{
	long total = 0;

	for (int order = 0; order < NR_ORDERS; order++)
		total += nr_free[order] << order;
	return total;
}

/* How many 2 MiB pages can be had without compacting for them: take all, count them, give them back. */
static long huge_pages(const char *allocator)
{
	char path[256];
	long nr;

	snprintf(path, sizeof(path), "%s/alloc", allocator);
	write_line(path, "1");
	snprintf(path, sizeof(path), "%s/allocated", allocator);
	nr = read_long(path);
	snprintf(path, sizeof(path), "%s/free", allocator);
	write_line(path, "1");
	return nr;
}

/* Somebody who asks for as many 2 MiB pages as there are, as a page fault does: none are made for it. */
static bool start_allocator(const char *allocator)
{
	char path[256];

	if (!check(!mkdir(allocator, 0755), "mkdir makes somebody who allocates"))
		return false;
	snprintf(path, sizeof(path), "%s/order", allocator);
	check(!write_long(path, HUGE_ORDER), "who asks for 2 MiB");
	snprintf(path, sizeof(path), "%s/gfp", allocator);
	check(!write_line(path, "GFP_TRANSHUGE_LIGHT"), "as a page fault does");
	snprintf(path, sizeof(path), "%s/count", allocator);
	return check(!write_long(path, ALL), "for more than there are");
}

static void show_configuration(void)
{
	static const char *const knobs[] = {"enabled", "min_fragments", "region_order"};
	static const long low[] = {0, 1, 9}, high[] = {1, 1024, 18};
	char path[128];

	puts("# Step 1: the configuration");
	for (int i = 0; i < 3; i++) {
		snprintf(path, sizeof(path), VM "dpu_compact_%s", knobs[i]);
		long value = read_long(path);

		printf("# dpu_compact_%s: %ld\n", knobs[i], value);
		check(value >= low[i] && value <= high[i], "dpu_compact_%s is %ld to %ld", knobs[i], low[i], high[i]);
		check(write_long(path, high[i] + 1) == EINVAL && read_long(path) == value,
		      "dpu_compact_%s refuses %ld and stays as it is", knobs[i], high[i] + 1);
	}
	check(!fopen(NODES "node0/compact_dpu", "r") && errno == EACCES, "compact_dpu cannot be read");
}

/* mkdir, so many bytes, a random half given back. */
static bool fragment_memory(const char *process)
{
	char path[256];

	puts("# Step 2: fragment memory");
	if (!check(!mkdir(process, 0755), "mkdir starts a process"))
		return false;
	snprintf(path, sizeof(path), "%s/anon", process);
	check(!write_long(path, (long)PROCESS_MIB << 20), "it gets %d MiB", PROCESS_MIB);
	check(read_long(path) == (long)PROCESS_MIB << 20, "and says so");
	snprintf(path, sizeof(path), "%s/holes", process);
	return check(!write_line(path, "50 seed=1"), "it gives a random half back");
}

static void compact_with_dpu(void)
{
	char path[128];
	long moved = value_of(STATS, "pages_moved");

	puts("# Step 4: compact with the DPU");
	check(!write_line(VM "dpu_compact_enabled", "1"), "the DPU is enabled");
	check(!write_line(VM "dpu_compact_region_order", "18"), "regions are as large as can be");
	for (int nid = 0; nid < MAX_NODES; nid++) {
		snprintf(path, sizeof(path), NODES "node%d/compact_dpu", nid);
		if (!access(path, F_OK))
			check(!write_line(path, "1"), "node %d is compacted", nid);
	}
	printf("# %ld pages moved by the DPU\n", value_of(STATS, "pages_moved") - moved);
	check(value_of(STATS, "pages_moved") > moved, "the DPU moved pages");
	check(!value_of(STATS, "regions_in_flight"), "nothing is under way any more");
}

static void compare(const long before[NR_ORDERS], const long after[NR_ORDERS], long huge_before, long huge_after)
{
	puts("# Step 5: compare");
	show_buddyinfo("before", before);
	show_buddyinfo("after", after);
	check(free_pages(after) == free_pages(before), "compaction neither frees nor takes memory");
	check(after[0] < before[0] / 10, "single free pages have become few");
	check(after[HUGE_ORDER] + 2 * after[HUGE_ORDER + 1] > before[HUGE_ORDER] + 2 * before[HUGE_ORDER + 1],
	      "there are more blocks of 2 MiB and more");
	printf("# %ld pages of 2 MiB could be had before, %ld can be had now\n", huge_before, huge_after);
	check(huge_after - huge_before >= PROCESS_MIB / 2 / 2 * 4 / 5, "at least four fifths of the holes can be had");
}

static void run(const char *process, const char *allocator)
{
	long before[NR_ORDERS], after[NR_ORDERS], huge_before, huge_after;
	char path[256];

	show_configuration();
	if (!fragment_memory(process))
		return;
	check(read_buddyinfo(before), "buddyinfo can be read");
	puts("# Step 3: try big allocations");
	if (!start_allocator(allocator))
		return;
	huge_before = huge_pages(allocator);
	compact_with_dpu();
	check(read_buddyinfo(after), "buddyinfo can be read again");
	huge_after = huge_pages(allocator);
	compare(before, after, huge_before, huge_after);
	snprintf(path, sizeof(path), "%s/verify", process);
	const char *verdict = read_line(path);

	check(verdict && !strcmp(verdict, "ok"), "the process finds every byte");
	check(!rmdir(allocator) && !rmdir(process), "rmdir ends both");
}

int main(void)
{
	long enabled = read_long(VM "dpu_compact_enabled"), order = read_long(VM "dpu_compact_region_order");
	long proactiveness = read_long(VM "compaction_proactiveness");
	char process[128], allocator[128];

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("TAP version 13");
	if (enabled < 0) {
		puts("1..0 # SKIP no DPU compaction in this kernel; run me under dpud exec");
		return KSFT_SKIP;
	}
	snprintf(process, sizeof(process), MM "ctest-%d", (int)getpid());
	/* While all large blocks are taken, what is left is fragmented: kcompactd would come and compact it. */
	write_long(VM "compaction_proactiveness", 0);
	snprintf(allocator, sizeof(allocator), ALLOC "ctest-%d", (int)getpid());
	run(process, allocator);
	write_long(VM "compaction_proactiveness", proactiveness);
	write_long(VM "dpu_compact_enabled", enabled);
	write_long(VM "dpu_compact_region_order", order);
	printf("1..%d\n", nr_tests);
	return nr_failed ? KSFT_FAIL : KSFT_PASS;
}

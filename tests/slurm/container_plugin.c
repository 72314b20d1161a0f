/* Takes the place of Pyxis in the tests: a SPANK plugin with its options --container-image, --container-mounts and
 * --container-workdir. Each task runs chrooted into the image (a directory) in a mount namespace of its own, with the mounts
 * SOURCE:TARGET,... and nothing else of the host but /proc, /sys, /dev and /etc/hosts. Like Pyxis it acts on a step's own options
 * alone. plugstack.conf: required PLUGIN.so LOGFILE; a line "JOB.STEP IMAGE" is written there for each task.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(containers_of_the_tests, 1)

enum { IMAGE, MOUNTS, WORKDIR, OPTIONS };
static const char *const names[OPTIONS] = {"container-image", "container-mounts", "container-workdir"};
static char *given[OPTIONS];

static int take(int option, const char *value, int remote)
{
	(void)remote;
	free(given[option]);
	given[option] = strdup(value);
	return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	(void)argc, (void)argv;
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_REMOTE)
		return 0; /* sbatch's own options stay unknown: each step must give them */
	for (int i = 0; i < OPTIONS; i++) {
		struct spank_option option = {(char *)names[i], (char *)"VALUE", (char *)"as of Pyxis", 1, i, take};
		if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
			return -1;
	}
	return 0;
}

static int failed(const char *what)
{
	slurm_error("container: %s: %s", what, strerror(errno));
	return -1;
}

/* Bind `source` to `target` below `root`, making the directories and the file that are missing there. */
static int bind_into(const char *root, const char *source, const char *target)
{
	char path[4096];
	struct stat info;
	snprintf(path, sizeof path, "%s%s", root, target);
	if (stat(source, &info))
		return failed(source);
	for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	if (S_ISDIR(info.st_mode))
		mkdir(path, 0755);
	else
		close(open(path, O_CREAT | O_WRONLY, 0644));
	return mount(source, path, NULL, MS_BIND | MS_REC, NULL) ? failed(path) : 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	static const char *const always[] = {"/proc", "/sys", "/dev", "/etc/hosts"};
	char *rest = NULL;
	uint32_t job = 0, step = 0;
	if (!given[IMAGE])
		return 0;
	spank_get_item(spank, S_JOB_ID, &job);
	spank_get_item(spank, S_JOB_STEPID, &step);
	FILE *log = argc > 0 ? fopen(argv[0], "a") : NULL;
	if (log) {
		fprintf(log, "%u.%u %s\n", job, step, given[IMAGE]);
		fclose(log);
	}
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return failed("mount namespace");
	if (mount(given[IMAGE], given[IMAGE], NULL, MS_BIND, NULL))
		return failed(given[IMAGE]);
	for (size_t i = 0; i < sizeof always / sizeof *always; i++)
		if (bind_into(given[IMAGE], always[i], always[i]))
			return -1;
	for (char *entry = given[MOUNTS] ? strtok_r(given[MOUNTS], ",", &rest) : NULL; entry; entry = strtok_r(NULL, ",", &rest)) {
		char *target = strchr(entry, ':');
		if (target)
			*target++ = 0;
		if (bind_into(given[IMAGE], entry, target ? target : entry))
			return -1;
	}
	return chroot(given[IMAGE]) || chdir("/") ? failed("chroot") : 0;
}

/* Slurm changes to the directory of submission between the two hooks. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	(void)spank, (void)argc, (void)argv;
	if (!given[IMAGE])
		return 0;
	return chdir(given[WORKDIR] ? given[WORKDIR] : "/") ? failed("work directory") : 0;
}

// QEMU's own suite, brought into a folder of the cache: it is under the GPL and never part of this repository.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { homedir } from 'node:os'
import { join, resolve } from 'node:path'

/** Debian's release whose QEMU is of the version that the tools on this machine are judged by. */
const RELEASE = 'trixie'
/** What of QEMU's source is needed: the suite, and the Python packages that it imports. */
const NEEDED = ['*/tests/qemu-iotests/*', '*/python/qemu/*']

export const cacheFolder = () =>
  process.env.QCOW2_CACHE ?? join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'qcow2-ci')

function must(program, args, options) {
  const { error, status, stdout, stderr } = spawnSync(program, args, { encoding: 'utf8', ...options })
  if (error || status !== 0) throw new Error(`${program} ${args.join(' ')}: ${error?.message ?? stderr.trim()}`)
  return stdout
}

/** The archive of QEMU's source, by apt, without touching the machine's own lists. Returns its name. */
function download(folder) {
  for (const name of ['lists/partial', 'cache/archives/partial']) mkdirSync(join(folder, name), { recursive: true })
  const targets = must('apt-get', ['indextargets', '--format', '$(REPO_URI)', 'Created-By: Packages'])
  const site = targets.split('\n').find(line => line !== '' && !line.includes('security'))
  if (site === undefined) throw new Error('apt has no lists: run apt-get update')
  writeFileSync(join(folder, 'sources.list'), `deb-src [trusted=yes] ${site} ${RELEASE} main\n`)
  const settings = [
    `Dir::Etc::SourceList=${folder}/sources.list`,
    'Dir::Etc::SourceParts=/dev/null',
    `Dir::State::Lists=${folder}/lists`,
    `Dir::Cache=${folder}/cache`,
    'Acquire::Check-Valid-Until=false',
    'APT::Sandbox::User=root',
    'Debug::NoLocking=1',
  ].flatMap(setting => ['-o', setting])
  must('apt-get', ['-qq', ...settings, 'update'])
  must('apt-get', ['-qq', ...settings, 'source', '--download-only', '--tar-only', 'qemu'], { cwd: folder })
  const archive = readdirSync(folder).find(name => /^qemu_.*\.orig\.tar\.\w+$/.test(name))
  if (archive === undefined) throw new Error('apt brought no source of QEMU')
  return join(folder, archive)
}

/**
 * The folder of the suite, `tests/qemu-iotests` of QEMU's source: of `QEMU_SRC` where that is set, else of the cache, into which it
 * is brought once.
 */
export function suiteFolder() {
  const given = process.env.QEMU_SRC
  const source = given === undefined ? join(cacheFolder(), 'iotests', RELEASE) : resolve(given)
  const suite = join(source, 'tests', 'qemu-iotests')
  if (existsSync(join(suite, 'check'))) return suite
  if (given !== undefined) throw new Error(`QEMU_SRC: there is no ${suite}/check`)
  const work = `${source}.new-${process.pid}`
  rmSync(work, { recursive: true, force: true })
  mkdirSync(join(work, 'tree'), { recursive: true })
  try {
    const archive = download(work)
    must('tar', ['-xf', archive, '-C', join(work, 'tree'), '--strip-components=1', '--wildcards', ...NEEDED])
    mkdirSync(join(work, 'tree', 'tests', 'qemu-iotests', 'sample_images'), { recursive: true })
    rmSync(source, { recursive: true, force: true })
    renameSync(join(work, 'tree'), source)
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
  return suite
}

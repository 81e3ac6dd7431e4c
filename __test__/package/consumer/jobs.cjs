// What becomes of a queue on this machine, which has none; prints it as one line of JSON.
const { Qcow2Error } = require('qcow2')
const jobs = require('qcow2/jobs')

async function main() {
  const module = await import('qcow2/jobs')
  const same = Object.keys(jobs).length > 1 && Object.keys(jobs).every(name => module[name] === jobs[name])
  const error = await module.openQueue({ connection: 'redis://127.0.0.1:1', timeout: 300 }).catch(reason => reason)
  console.log(JSON.stringify({ code: error.code, message: error.message, same: same && error instanceof Qcow2Error }))
}

main().catch(error => {
  console.error(error)
  process.exitCode = 1
})

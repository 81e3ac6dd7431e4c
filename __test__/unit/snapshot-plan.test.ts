import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { checkName, findSnapshot, nextId } from '../../src/snapshot/ids.js'
import { planApply, planCreate, planDelete, planRename } from '../../src/snapshot/plan.js'
import type { Plan, SnapshotTable, Step } from '../../src/snapshot/types.js'

const table: SnapshotTable = {
  generation: 7,
  records: [
    { id: '1', name: 'first' },
    { id: '3', name: 'third' },
    { id: '4', name: '1' },
  ],
}

/** A plan in one line a step, as golden text. */
const lines = ({ steps }: Plan): string[] =>
  steps.map(step => {
    if ('tree' in step) return `${step.op} ${step.tree}`
    if ('from' in step) return `${step.op} ${step.from}`
    if ('entries' in step) {
      const entries = step.entries.map(entry =>
        'keep' in entry
          ? `${entry.keep}${entry.rename === undefined ? '' : `=${entry.rename}`}`
          : `+${entry.create.id}`,
      )
      return `${step.op} ${entries.join(' ')}`.trim()
    }
    return step.op
  })

const plans = {
  create: planCreate(table, { name: 'new', date: new Date(1_700_000_000_123) }),
  apply: planApply(table, 'third'),
  delete: planDelete(table, '3'),
  rename: planRename(table, 'first', 'erste'),
}

describe('plans', () => {
  // The same text is what the engine's own tests, power cuts among them, execute.
  it('are the golden ones', () => {
    expect(plans.create.created).toEqual({ id: '5', name: 'new', dateSec: 1_700_000_000, dateNsec: 123_000_000 })
    const golden = readFileSync(new URL('snapshot-plans.txt', import.meta.url), 'utf8')
    const named = golden
      .split('\n\n')
      .slice(1)
      .map(text => text.trimEnd().split('\n'))
    expect([
      ['create new', ...lines(plans.create)],
      ['apply third', ...lines(plans.apply)],
      ['delete 3', ...lines(plans.delete)],
      ['rename first erste', ...lines(plans.rename)],
    ]).toEqual(named)
  })

  it.each(Object.entries(plans))('%s never relies on what no barrier made durable', (_, plan) => {
    expect(plan.generation).toBe(7)
    const writes: Step['op'][] = [
      'clear-copied',
      'copy-l1',
      'add-references',
      'write-table',
      'set-table',
      'set-active-l1',
    ]
    const relies: Step['op'][] = [
      'set-table',
      'set-active-l1',
      'drop-references',
      'free-l1',
      'free-table',
      'restore-copied',
    ]
    let unsettled = false
    for (const { op } of plan.steps) {
      if (relies.includes(op)) expect(unsettled, op).toBe(false)
      if (op === 'barrier') unsettled = false
      else if (writes.includes(op)) unsettled = true
    }
    expect(plan.steps.at(-1)).toEqual({ op: 'barrier' })
  })

  it('counts references before anything refers, and drops them after', () => {
    const order = (plan: Plan, op: Step['op']) => plan.steps.findIndex(step => step.op === op)
    expect(order(plans.create, 'add-references')).toBeLessThan(order(plans.create, 'set-table'))
    expect(order(plans.apply, 'add-references')).toBeLessThan(order(plans.apply, 'set-active-l1'))
    expect(order(plans.apply, 'drop-references')).toBeGreaterThan(order(plans.apply, 'set-active-l1'))
    expect(order(plans.delete, 'drop-references')).toBeGreaterThan(order(plans.delete, 'set-table'))
    expect(order(plans.create, 'clear-copied')).toBeLessThan(order(plans.create, 'add-references'))
  })
})

describe('ids and names', () => {
  it('numbers on from the largest id', () => {
    expect(nextId([])).toBe('1')
    expect(nextId(table.records)).toBe('5')
    expect(nextId([{ id: 'x', name: '' }])).toBe('1')
    expect(nextId([{ id: '99999999999999999999', name: '' }])).toBe('100000000000000000000')
  })

  it('looks for ids before names', () => {
    expect(findSnapshot(table.records, '1')).toBe(0)
    expect(findSnapshot(table.records, 'third')).toBe(1)
    expect(() => findSnapshot(table.records, 'none')).toThrow(
      expect.objectContaining({ code: 'ERR_QCOW2_NO_SNAPSHOT' }),
    )
  })

  it.each([[''], ['a\0b'], ['x'.repeat(65536)], [7], [undefined]])('refuses the name %j', name => {
    expect(() => checkName(name, 'name')).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT' }))
  })
})
